"""What the task is: which part of a batch the model sees, the loss, the predictions.

The step, the loop and the evaluation reach the task through these functions alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

Batch = Mapping[str, jax.Array]


def inputs(batch: Batch) -> jax.Array:
    """What the model is applied to."""
    return batch["image"]


def loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross entropy; logits float32 [batch, classes], a scalar out."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def predict(logits: jax.Array) -> jax.Array:
    """The likeliest class, int32 [batch]."""
    return logits.argmax(axis=-1)


def accuracy(predictions: jax.Array, batch: Batch) -> jax.Array:
    """The share of right predictions, a scalar."""
    return (predictions == batch["label"]).mean()
