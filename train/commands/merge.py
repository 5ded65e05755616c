"""The command that combines the adapters of runs to a new run directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import jax

import jlora
from jlora.files.buckets import is_in_bucket, located
from jlora.files.checksums import SUMS
from train.commands.inputs import RunPaths
from train.commands.one_base import open_runs
from train.config import ConfigError
from train.rundir.bases import copy_base
from train.rundir.directory import DRAFT, RunDirectory
from train.rundir.finished import FinishedRun

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


def merge(
    runs: RunPaths,
    weights: str | None = None,
    method: Method = "cat",
    out: Path = Path("runs/merged"),
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] | None = None,
    seed: int = 0,
) -> None:
    """Combine the adapters of runs on one base, and write a run directory for eval, predict, generate, export, report.

    Args:
      runs: Finished runs; the result has the configuration of the first.
      weights: A number for each run, as 0.5,0.5. Default: the mean.
      method: As PEFT's combination_type. cat: the exact sum. svd: the nearest sum of a rank.
      out: Run directory to write.
      rank: Of svd and methods that end in it. Default: the largest of the runs.
      density: Share of the entries that sparse methods keep.
      majority_sign: Of ties: that of the sum (total, the default), or of most entries (frequency).
      seed: Of the entries that dare keeps.
    """
    if not runs:
        raise ConfigError("merge: got no runs; pass them as `python -m train merge RUN RUN`")
    numbers = _numbers(weights, len(runs))
    target = located(out)
    if is_in_bucket(target):
        raise ConfigError(f"got --out {out}; expected a local folder, which can then be copied")
    if target.exists():
        raise ConfigError(f"{target} already exists; pass --out with a new folder")
    opened = open_runs(runs, "merge")
    key = jax.random.key(seed) if method.startswith("dare") else None
    first = opened[0]
    try:
        adapters = jlora.add_weighted(
            [run.adapters for run in opened],
            numbers,
            method,
            rank=rank,
            density=density,
            majority_sign=majority_sign,
            key=key,
            params=first.params,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    how = {"method": method, "rank": rank, "density": density, "majority_sign": majority_sign}
    how |= {"seed": seed} if key is not None else {}
    used = {name: value for name, value in how.items() if value is not None}
    _write(target, first, adapters, {"runs": [str(run.folder) for run in opened], "weights": numbers, **used})
    total = ", ".join(f"{weight:g} x {run.folder}" for weight, run in zip(numbers, opened, strict=True))
    print(f"{method} of {total}\nwritten to {target}; its metrics: python -m train eval {target}")


def _numbers(weights: str | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    try:
        numbers = [float(word) for word in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f"got --weights {weights}; expected numbers such as 0.5,0.5") from error
    if len(numbers) != count:
        raise ConfigError(f"got {len(numbers)} weights for {count} runs; expected one for each, such as 0.5,0.5")
    return numbers


def _write(folder: Path, first: FinishedRun, adapters: Any, merged: dict[str, Any]) -> None:
    """A finished run directory with these adapters; it gets its name once it is complete."""
    source = RunDirectory(first.folder)
    draft = folder.with_name(folder.name + DRAFT)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    directory = RunDirectory(draft)
    directory.write_config(first.config)
    directory.write_data(source.read_data())
    lines = [f"{name}: {value}" for name, value in merged.items()]
    directory.write_plan("\n".join(["adapters combined by python -m train merge", *lines]))
    directory.metrics.touch()
    if (source.base / SUMS).is_file():
        copy_base(source.base, directory.base)
    jlora.save(directory.adapters, jax.device_get(adapters))
    kept = ("name", "mode", "seed", "primary", "examples", "data", "labels", "total", "base")
    summary = {name: value for name, value in source.read_summary().items() if name in kept}
    summary["trainable"] = sum(x.size for x in jax.tree.leaves(adapters))
    directory.finish({**summary, "ended": "merged", "merged": merged, "metrics": {}, "run_dir": str(folder)})
    draft.rename(folder)
