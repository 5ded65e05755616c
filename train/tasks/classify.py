"""Classification and regression: loss and metrics, and the tasks on texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config import SequenceClassification
from train.data.batches import Batch
from train.data.lines import in_batches
from train.data.ragged import Examples, Kind, Ragged
from train.data.tables import Table, texts
from train.data.truncation import Truncation
from train.tasks import metrics
from train.tasks.base import Measured, cross_entropy
from train.tasks.encoding import CHUNK, Draft
from train.tasks.labels import class_numbers, regression_targets, weight_vector


class Classification:
    """Classification: cross entropy, accuracy, F1 and Matthews' correlation.

    Attributes:
      labels: the names of the classes.
      weights: the classes' weights in the loss, float32 [classes], or None; metrics are not weighted.
    """

    primary = "accuracy"
    higher_is_better = True
    labels: Sequence[str] = ()
    weights: np.ndarray | None = None

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Cross entropy; ``outputs`` are logits [batch, classes]. With weights, the count is the sum of the weights."""
        labels = jnp.asarray(batch["label"])
        if self.weights is None:
            losses = cross_entropy(outputs, labels, smoothing)
            return losses.sum(), jnp.float32(losses.size)
        weights = jnp.asarray(self.weights)
        return cross_entropy(outputs, labels, smoothing, weights).sum(), weights[labels].sum()

    def measure(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return {"outputs": outputs.astype(jnp.float32), "label": jnp.asarray(batch["label"])}

    def metrics(self, measured: Measured) -> dict[str, float]:
        return metrics.classification(measured["outputs"], measured["label"])

    def predictions(self, measured: Measured) -> np.ndarray:
        """The most likely class, int [n]."""
        return measured["outputs"].argmax(axis=-1)


class Regression:
    """Regression: squared error, Pearson's and Spearman's correlation."""

    primary = "pearson"
    higher_is_better = True

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Squared error; ``outputs`` are [batch, 1]. ``smoothing`` has no effect."""
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
        self.weights = weight_vector(config.class_weights, labels)

    def encode(self, table: Table, draft: Draft | None = None) -> dict[str, Examples]:
        """``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer has them, and ``label``."""
        config = self.config
        pairs = None if config.pair is None else texts(table, config.pair, "task.pair")
        examples: dict[str, np.ndarray | Ragged] = dict(
            self.tokens(texts(table, config.text, "task.text"), pairs, draft)
        )
        if config.regression:
            examples["label"] = regression_targets(table, config.label)
        else:
            examples["label"] = class_numbers(table, config.label, self.labels)
        return {"": examples}

    def tokens(
        self, first: Iterable[str], pairs: Iterable[str] | None = None, draft: Draft | None = None
    ) -> dict[str, Ragged]:
        """Texts, or pairs of texts, truncated to ``max_length`` tokens."""
        tokenizer, limit = self.tokenizer, self.config.max_length
        left, cut = tokenizer.padding_side == "left", Truncation.of(limit, [])
        kinds = {
            "input_ids": Kind(tokenizer.pad_token_id or 0, left=left),
            "attention_mask": Kind(dtype=None, left=left),
            "token_type_ids": Kind(dtype="uint8", left=left),
        }
        made = tokenizer("a", None if pairs is None else "a")
        with (draft or Draft()).writer({name: kind for name, kind in kinds.items() if name in made}) as writer:
            for part in in_batches(zip(first) if pairs is None else zip(first, pairs, strict=True), CHUNK):
                columns = [list(column) for column in zip(*part, strict=True)]
                found = tokenizer(*columns, verbose=False)
                here = Truncation.of(limit, [len(one) for one in found["input_ids"]])
                if here.cut:
                    found = tokenizer(*columns, truncation=True, max_length=limit)
                cut = cut.plus(here)
                writer.add({name: found[name] for name in ("input_ids", "token_type_ids") if name in made})
        return writer.columns(cut)

    def inputs(self, batch: Batch, smoothing: float = 0.0) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


class TextClassification(Texts, Classification):
    """Assigns a class to a text."""


class TextRegression(Texts, Regression):
    """Predicts a number for a text."""
