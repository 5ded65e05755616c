"""From the parquet file to batches: file → arrays → a domain → batches.

Examples are a dict of arrays whose leading axis counts them, and so is a batch. Which example comes when is a pure
function of (seed, epoch): a run can be repeated, resumed, or split over processes without any state to carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import numpy as np

from train.config import IMAGE_SIDE, ConfigError, Domain

Examples = Mapping[str, np.ndarray]

COLUMNS = ("image", "label", "split")
DARKEST = 16


def load(file: Path, cache_dir: Path) -> dict[str, Examples]:
    """Read the training and the test images.

    Nothing is fetched: `datasets` converts the local file to an Arrow file below ``cache_dir`` and maps that.

    Returns:
      ``{"train": examples, "test": examples}``, where examples hold ``image``, float32 [n, 8, 8] from 0 (paper) to 1
      (ink), and ``label``, int32 [n].

    Raises:
      ConfigError: if the file lacks a column or a split, or its images have another size.
    """
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(cache_dir / "datasets"))
    missing = sorted(set(COLUMNS) - set(table.column_names))
    if missing:
        raise ConfigError(f"data.file: {file} has columns {table.column_names}; {', '.join(missing)} is missing")
    columns = table.with_format("numpy")[:]
    images = np.asarray(columns["image"])
    if images.shape[1:] != (IMAGE_SIDE**2,):
        raise ConfigError(f"data.file: {file} has images of shape {images.shape[1:]}, expected ({IMAGE_SIDE**2},)")
    images = (images.reshape(-1, IMAGE_SIDE, IMAGE_SIDE) / DARKEST).astype(np.float32)
    labels = np.asarray(columns["label"]).astype(np.int32)

    parts = {}
    for split in ("train", "test"):
        rows = np.asarray(columns["split"]) == split
        if not rows.any():
            raise ConfigError(f"data.file: {file} has no row whose split is {split!r}")
        parts[split] = {"image": images[rows], "label": labels[rows]}
    return parts


def in_domain(examples: Examples, domain: Domain) -> Examples:
    """The same examples, shown as ``domain`` shows them."""
    images = np.rot90(examples["image"], domain.quarter_turns, axes=(1, 2))
    images = 1 - images if domain.invert else images
    return {**examples, "image": np.ascontiguousarray(images)}


def size(examples: Examples) -> int:
    """How many examples there are."""
    return len(next(iter(examples.values())))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which ``count`` examples are seen in an epoch: a function of its arguments and nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_batches(examples: Examples, batch_size: int, seed: int, epoch: int) -> Iterator[Examples]:
    """The epoch's batches, all of one size, so that the step is compiled once; the rest of the examples is dropped."""
    order = epoch_order(size(examples), seed, epoch)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield {name: column[rows] for name, column in examples.items()}


def padded_batches(examples: Examples, batch_size: int) -> Iterator[Examples]:
    """All examples in their own order, in batches of one size; the last repeats the last example to fill up."""
    count = size(examples)
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        yield {name: column[rows] for name, column in examples.items()}
