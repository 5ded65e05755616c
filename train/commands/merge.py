"""The command that combines the adapters of runs to a new run directory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import jlora
from jlora.files.buckets import is_in_bucket, located
from jlora.files.checksums import SUMS
from jlora.messages import bullets
from train.config import ConfigError
from train.rundir.bases import copy_base
from train.rundir.directory import DRAFT, RunDirectory
from train.rundir.finished import FinishedRun, open_run

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN [RUN...]")]
Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


def merge(
    runs: Runs,
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
    opened = [open_run(run) for run in runs]
    _check_one_base(opened)
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


def _check_one_base(runs: Sequence[FinishedRun]) -> None:
    """Raises a ConfigError listing what differs between the tasks and bases of the runs."""
    first, wrong = runs[0], []
    leaves = jlora.named_leaves(first.params)[0]
    for run in runs[1:]:
        for name in ("task", "model"):
            if (one := getattr(run.config, name)) != (other := getattr(first.config, name)):
                wrong += [f"{run.folder}: {name}.{field}" for field in _differing(one, other)]
        other = jlora.named_leaves(run.params)[0]
        different = [path for path in {**leaves, **other} if not _same(leaves.get(path), other.get(path))]
        wrong += [f"{run.folder}: the base's {path}" for path in different[:8]]
        wrong += [f"{run.folder}: {len(different) - 8} more leaves of the base"] if len(different) > 8 else []
    if wrong:
        raise ConfigError(
            f"merge: {len(wrong)} differences from {first.folder}:{bullets(wrong)}\nExpected runs of one task on one "
            "base. A new head starts from the seed: train the runs with one --seed, on different data or settings."
        )


def _differing(one: Any, other: Any) -> list[str]:
    if type(one) is not type(other):
        return [f"kind ({type(one).__name__}, {type(other).__name__})"]
    names = [field.name for field in dataclasses.fields(one)]
    values = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return [f"{name} = {a!r}, {b!r} there" for name, a, b in values if a != b]


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=False)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


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
