"""The command that shows what a run would learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.commands.sheet import write_sheet
from train.config import ConfigError, ImageClassification, TrainConfig
from train.data.batches import Examples, size, truncation_of
from train.job import TrainingData, training_data
from train.report import examples as look

MANY = 12
"""Labels up to which each one is counted."""


@dataclass(frozen=True)
class Asked:
    """Show what a run would learn from: examples as they are learnt, their lengths, their labels.

    The data are read and encoded as `python -m train CONFIG.py` does, with the same flags, which its --help lists. No
    weights are read.

    Attributes:
      examples: how many are shown, the first ones; of images, how many of each label.
      tokens: put a bar between tokens.
      out: of images, the PNG to write, by default examples.png.
    """

    examples: int = 3
    tokens: bool = False
    out: Path | None = None


def show(config: TrainConfig, asked: Asked) -> None:
    """Print, and for images draw, what a configuration's run would learn from.

    Raises:
      ConfigError: as a run does, of its configuration and data; and if what is asked for does not fit them.
    """
    images = isinstance(config.task, ImageClassification)
    if asked.examples < 1:
        raise ConfigError(f"show: got --examples {asked.examples}, expected a whole number >= 1")
    if asked.tokens if images else asked.out is not None:
        flag, kind = ("--tokens", "texts") if images else ("--out", "images")
        raise ConfigError(f"show: got {flag}, which is for {kind}; leave it out")
    found = training_data(config)
    print(f"{config.name}: {type(config.task).__name__}\n")
    for name, sets in (("train", found.train), ("validation", found.test)):
        print("\n".join(summary(name, found, sets)))
    if images:
        _draw(asked.out or Path("examples.png"), found, asked.examples)
    else:
        _print(found, asked.examples, bars=asked.tokens)


def _print(found: TrainingData, count: int, *, bars: bool) -> None:
    learnt = found.train[list(found.train)[-1]]
    for row in range(min(count, size(learnt))):
        print(f"\nexample {row + 1} of {size(learnt):,}: {look.about(found.task, learnt, row)}")
        parts = look.pieces(found.task, learnt, row, every=bars)
        print("\n-- packed behind it --\n".join(look.marked(one, bars=bars) for one in parts))


def summary(name: str, found: TrainingData, sets: Mapping[str, Examples]) -> Iterator[str]:
    """Lines about the training or the validation examples: how many, how long, of which labels."""
    task: Any = found.config.task
    examples = sets[list(sets)[-1]]
    if "input_ids" in examples:
        long, learnt = counts(examples)
        cut = truncation_of(examples)
        packed = f", packed into {size(examples):,} rows of at most {task.max_length:,} tokens"
        yield f"{name}: {len(long):,} examples{packed if 'segment_ids' in examples else ''}"
        yield f"  tokens  {_spread(long)}"
        if cut is not None and cut.cut + cut.dropped:
            yield f"  {cut.describe('cut')}"
        if "loss_mask" in examples:
            share = learnt.sum() / long.sum()
            yield f"  learnt  {_spread(learnt)}; {learnt.sum():,} of {long.sum():,} tokens ({share:.1%})"
    else:
        domains = f", shown as {' and '.join(sets)}" if len(sets) > 1 else ""
        yield f"{name}: {size(examples):,} images of {' x '.join(map(str, examples['image'][0].shape))}{domains}"
    if "label" in examples:
        yield f"  labels  {_labels(getattr(found.task, 'labels', ()), np.asarray(examples['label']))}"


def counts(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Of each example, also of those that are packed: how many tokens it has, and how many are learnt; int [n] both."""
    long, learnt = [], []
    for row, ids in enumerate(examples["input_ids"]):
        segments = examples["segment_ids"][row] if "segment_ids" in examples else np.ones(len(ids), np.int32)
        marks = look.loss_mask_of(examples, row) if "loss_mask" in examples else np.zeros(len(ids), bool)
        long += np.bincount(segments)[1:].tolist()
        learnt += np.bincount(segments, marks)[1:].astype(int).tolist()
    return np.asarray(long), np.asarray(learnt)


def _spread(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,}, median {np.median(values):,.0f}"


def _labels(names: Sequence[str], values: np.ndarray) -> str:
    """How often there is each label; of many, the most frequent ones and the rarest; of numbers, their range."""
    if not names:
        return f"{values.min():g} to {values.max():g}, median {np.median(values):g}"
    often = np.bincount(values, minlength=len(names))
    order = range(len(names)) if len(names) <= MANY else np.argsort(-often, kind="stable")
    shown = [f"{names[i]}: {often[i]:,} ({often[i] / len(values):.1%})" for i in order]
    if len(names) > MANY:
        shown = [*shown[: MANY - 1], f"{len(names) - MANY} more", shown[-1]]
    return ", ".join(shown)


def _draw(out: Path, found: TrainingData, each: int) -> None:
    network, names = found.network, getattr(found.task, "labels", ())
    pixels = {
        domain: np.clip(examples["image"] * np.asarray(network.std) + np.asarray(network.mean), 0, 1)
        for domain, examples in found.train.items()
    }
    labels = np.asarray(next(iter(found.train.values()))["label"])
    write_sheet(out, pixels, labels, names, each)
    print(f"\nwritten to {out}: images as the network sees them")
