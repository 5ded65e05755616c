"""The command that shows a run's training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.commands.contact_sheet import write_contact_sheet
from train.commands.options import ShowOptions
from train.config import ConfigError, ImageClassification, TrainConfig
from train.data.batches import size, truncation_of
from train.data.ragged import Examples
from train.job import TrainingData, training_data
from train.report import examples as shown
from train.tasks import labels


def show(config: TrainConfig, options: ShowOptions) -> None:
    """Print the training data of a configuration; for images, draw a contact sheet.

    Raises:
      ConfigError: as a run does, for the configuration and the data; or if an option does not apply.
    """
    images = isinstance(config.task, ImageClassification)
    if options.examples < 1:
        raise ConfigError(f"got --examples {options.examples}, expected a whole number >= 1")
    if options.tokens if images else options.out is not None:
        flag, kind = ("--tokens", "texts") if images else ("--out", "images")
        raise ConfigError(f"got {flag}, which is for {kind}; omit it")
    data = training_data(config)
    print(f"{config.name}: {type(config.task).__name__}\n")
    sets = {"train": list(data.train.values())[-1], "validation": list(data.test.values())[-1]}
    for name, examples in sets.items():
        print("\n".join(_summary(name, data, examples)))
    if names := getattr(data.task, "labels", ()):
        counts = {name: labels.class_counts(np.asarray(one["label"]), names) for name, one in sets.items()}
        print(f"\n{labels.counts_table(counts, getattr(data.config.task, 'class_weights', None))}")
    if images:
        _draw(options.out or Path("examples.png"), data, options.examples)
    else:
        _print_examples(data, sets["train"], options.examples, bars=options.tokens)


def _summary(name: str, data: TrainingData, examples: Examples) -> Iterator[str]:
    """Lines about the training or validation examples: their number, lengths, and tokens with loss."""
    task: Any = data.config.task
    if "input_ids" not in examples:
        domains = f", shown as {' and '.join(data.train)}" if len(data.train) > 1 else ""
        yield f"{name}: {size(examples):,} images of {' x '.join(map(str, examples['image'][0].shape))}{domains}"
        return
    tokens, with_loss = token_counts(examples)
    packed = f", packed into {size(examples):,} rows of at most {task.max_length:,} tokens"
    yield f"{name}: {len(tokens):,} examples{packed if 'segment_ids' in examples else ''}"
    yield f"  tokens  {_range(tokens)}"
    if (cut := truncation_of(examples)) is not None and cut.cut + cut.dropped:
        yield f"  {cut.describe('cut')}"
    if "loss_mask" in examples:
        fraction = with_loss.sum() / tokens.sum()
        yield (
            f"  tokens with loss  {_range(with_loss)}; {with_loss.sum():,} of {tokens.sum():,} tokens ({fraction:.1%})"
        )
    if getattr(task, "regression", False):
        values = np.asarray(examples["label"])
        yield f"  labels  {values.min():g} to {values.max():g}, median {np.median(values):g}"


def token_counts(examples: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of tokens, and of those that carry loss, per example, int [n] both; packed examples are separate."""
    tokens, with_loss = [], []
    for row, ids in enumerate(examples["input_ids"]):
        segments = examples["segment_ids"][row] if "segment_ids" in examples else np.ones(len(ids), np.int32)
        mask = shown.loss_mask_of(examples, row) if "loss_mask" in examples else np.zeros(len(ids), bool)
        tokens += np.bincount(segments)[1:].tolist()
        with_loss += np.bincount(segments, mask)[1:].astype(int).tolist()
    return np.asarray(tokens), np.asarray(with_loss)


def _range(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,}, median {np.median(values):,.0f}"


def _print_examples(data: TrainingData, examples: Examples, count: int, *, bars: bool) -> None:
    for row in range(min(count, size(examples))):
        print(f"\nexample {row + 1} of {size(examples):,}: {shown.about(data.task, examples, row)}")
        parts = shown.pieces(data.task, examples, row, every=bars)
        print("\n-- packed behind it --\n".join(shown.marked(one, bars=bars) for one in parts))


def _draw(out: Path, data: TrainingData, each: int) -> None:
    network, names = data.network, getattr(data.task, "labels", ())
    pixels = {
        domain: np.clip(examples["image"] * np.asarray(network.std) + np.asarray(network.mean), 0, 1)
        for domain, examples in data.train.items()
    }
    numbers = np.asarray(next(iter(data.train.values()))["label"])
    write_contact_sheet(out, pixels, numbers, names, each)
    print(f"\nwritten to {out}: images as the network sees them")
