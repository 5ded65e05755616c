"""Classification: what texts and images share, and the two tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._paths import nearest
from train import metrics
from train.batches import Batch, Examples, Ragged
from train.config import ConfigError, Domain, ImageClassification, SequenceClassification
from train.cuts import cut_to
from train.data import Table, column
from train.tasks.base import Measured, cross_entropy


class Classification:
    """One of several classes: cross entropy, accuracy, F1 and Matthews' correlation."""

    primary = "accuracy"
    higher_is_better = True

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Cross entropy; ``outputs`` are logits [batch, classes]."""
        losses = cross_entropy(outputs, jnp.asarray(batch["label"]), smoothing)
        return losses.sum(), jnp.float32(losses.size)

    def measure(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"outputs": outputs.astype(jnp.float32), "label": jnp.asarray(batch["label"])}

    def metrics(self, measured: Measured) -> dict[str, float]:
        return metrics.classification(measured["outputs"], measured["label"])

    def predictions(self, measured: Measured) -> np.ndarray:
        """The likeliest class, int [n]."""
        return measured["outputs"].argmax(axis=-1)


class Regression:
    """A number: squared error, Pearson's and Spearman's correlation."""

    primary = "pearson"
    higher_is_better = True

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Squared error; ``outputs`` are [batch, 1]. There are no labels to be smoothed."""
        errors = (outputs[:, 0].astype(jnp.float32) - batch["label"]) ** 2
        return errors.sum(), jnp.float32(errors.size)

    def measure(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"outputs": outputs[:, 0].astype(jnp.float32), "label": jnp.asarray(batch["label"])}

    def metrics(self, measured: Measured) -> dict[str, float]:
        return metrics.regression(measured["outputs"], measured["label"])

    def predictions(self, measured: Measured) -> np.ndarray:
        """The number, rounded to three decimals, float [n]."""
        return measured["outputs"].round(3)


class Texts:
    """Texts, or pairs of them, as tokens."""

    def __init__(self, config: SequenceClassification, labels: Sequence[str], tokenizer: Any):
        self.config, self.labels, self.tokenizer = config, list(labels), tokenizer
        tokenizer.truncation_side = config.truncation

    def encode(self, table: Table) -> dict[str, Examples]:
        """Tokens, mask and, where the network has them, token types; and ``label``."""
        config = self.config
        texts = [str(text) for text in column(table, config.text, "task.text")]
        pairs = None if config.pair is None else [str(text) for text in column(table, config.pair, "task.pair")]
        examples: dict[str, np.ndarray | Ragged] = dict(self.tokens(texts, pairs))
        raw = column(table, config.label, "task.label")
        examples["label"] = _numbers(raw) if config.regression else class_numbers(raw, self.labels, config.label)
        return {"": examples}

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, Ragged]:
        """What the network sees of ``texts``."""
        limit, whole = self.config.max_length, self.tokenizer(list(texts), pairs, verbose=False)
        cut = cut_to(limit, [len(one) for one in whole["input_ids"]])
        found = self.tokenizer(list(texts), pairs, truncation=True, max_length=limit) if cut.cut else whole
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        left = self.tokenizer.padding_side == "left"
        return {
            name: Ragged(found[name], fill or 0, left=left, cut=cut) for name, fill in fills.items() if name in found
        }

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


class TextClassification(Texts, Classification):
    """One of several classes for a text."""


class TextRegression(Texts, Regression):
    """A number for a text."""


class Images(Classification):
    """One of several classes for an image."""

    def __init__(self, config: ImageClassification, labels: Sequence[str], channels: int, mean: Any, std: Any):
        self.config, self.labels, self.channels = config, list(labels), channels
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def encode(self, table: Table) -> dict[str, Examples]:
        """``image`` in every domain, float32 [n, side, side, channels], normalized; and ``label``."""
        config = self.config
        assert config.side is not None
        raw = column(table, config.image, "task.image")
        plain = np.stack([_pixels(image, config.side, self.channels) for image in raw]) / config.brightest
        labels = class_numbers(column(table, config.label, "task.label"), self.labels, config.label)
        return {
            name: {"image": self._normalized(in_domain(plain, domain)), "label": labels}
            for name, domain in (config.domains or {"": Domain()}).items()
        }

    def _normalized(self, images: np.ndarray) -> np.ndarray:
        return ((images - self._mean) / self._std).astype(np.float32)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"images": batch["image"]}


def in_domain(images: np.ndarray, domain: Domain) -> np.ndarray:
    """Images [n, height, width, channels] from 0 to 1, shown as ``domain`` shows them."""
    images = np.rot90(images, domain.quarter_turns, axes=(1, 2))
    return np.ascontiguousarray(1 - images if domain.invert else images)


def image_side(image: Any) -> int:
    """The side of a picture, or of a square image given as a flat list of its pixels."""
    if hasattr(image, "convert"):
        return max(image.size)
    return round(_flat(image).size ** 0.5)


def _pixels(image: Any, side: int, channels: int) -> np.ndarray:
    """One image as float32 [side, side, channels] in its own range of brightness."""
    if hasattr(image, "convert"):
        image = image.convert("L" if channels == 1 else "RGB").resize((side, side))
        return np.asarray(image, np.float32).reshape(side, side, channels)
    pixels = _flat(image)
    if pixels.size != side * side:
        raise ConfigError(
            f"task.image: an image has {pixels.size} pixels, expected {side} x {side}: numbers are not resized, "
            "pictures are"
        )
    return np.repeat(pixels.reshape(side, side, 1), channels, axis=-1)


def _flat(image: Any) -> np.ndarray:
    """The pixels of an image that is given as numbers.

    Raises:
      ConfigError: if these are none, or not a square number of them.
    """
    try:
        pixels = np.asarray(image, np.float32).ravel()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task.image: {image!r:.80} is no image; expected a picture, or its pixels") from error
    if round(pixels.size**0.5) ** 2 != pixels.size:
        raise ConfigError(f"task.image: an image has {pixels.size} pixels; expected a picture, or a square number")
    return pixels


def label_names(table: Table, label: str) -> list[str]:
    """The names of the classes: as the data declares them, or the different labels in order."""
    feature = table.features.get(label)
    if hasattr(feature, "names"):
        return list(feature.names)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return [_word(value) for value in sorted(set(column(table, label, "task.label")))]


def class_numbers(raw: Sequence[Any], labels: Sequence[str], name: str) -> np.ndarray:
    """Labels of the column ``name`` as class numbers, int32 [n]: by the classes' names, or numbers from 0 as they are.

    Raises:
      ConfigError: naming every label that is no class.
    """
    by_name = {label: i for i, label in enumerate(labels)}
    words = [_word(value) for value in raw]
    # Numbers may themselves be names ("3" and "7"): then the names decide.
    if not set(words) <= set(by_name) and all(word.isdigit() for word in words):
        by_name = {str(i): i for i in range(len(labels))}
    if wrong := sorted(set(words) - set(by_name)):
        raise ConfigError(
            f"task.label: the column {name!r} holds {', '.join(map(repr, wrong[:8]))}, which is no class"
            f"{nearest(wrong[0], labels)}; expected one of {', '.join(labels)}, or its number from 0. "
            "Pass --task.labels"
        )
    return np.asarray([by_name[word] for word in words], np.int32)


def _word(value: Any) -> str:
    """A label as text; 1.0, as some readers give whole numbers, is 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _numbers(raw: Sequence[Any]) -> np.ndarray:
    try:
        numbers = np.asarray([float(value) for value in raw], np.float32)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task.label: {error}; a regression needs numbers") from error
    if not np.isfinite(numbers).all():
        raise ConfigError("task.label: a regression needs finite numbers; the column holds NaN or infinity")
    return numbers
