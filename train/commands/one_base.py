"""Several runs of one task on one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora.messages import bullets
from train.config import ConfigError
from train.rundir.finished import FinishedRun, open_run


def open_runs(folders: Sequence[Path], what: str) -> list[FinishedRun]:
    """Finished runs of one task on one base, which is in memory once.

    Raises:
      ConfigError: listing what differs between the tasks and bases of the runs; or as `open_run`.
    """
    first = open_run(folders[0])
    runs, wrong = [first, *(open_run(folder, first) for folder in folders[1:])], []
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
            f"{what}: {len(wrong)} differences from {first.folder}:{bullets(wrong)}\nExpected runs of one task on one "
            "base. A new head starts from the seed: train the runs with one --seed, on different data or settings."
        )
    return [dataclasses.replace(run, params=first.params) for run in runs]


def _differing(one: Any, other: Any) -> list[str]:
    if type(one) is not type(other):
        return [f"kind ({type(one).__name__}, {type(other).__name__})"]
    names = [field.name for field in dataclasses.fields(one)]
    values = [(name, getattr(one, name), getattr(other, name)) for name in names]
    return [f"{name} = {a!r}, {b!r} there" for name, a, b in values if a != b]


def _same(one: Any, other: Any) -> bool:
    if one is other or one is None or other is None:
        return one is other
    if jax.tree.structure(one) != jax.tree.structure(other):  # quantized in other ways
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
