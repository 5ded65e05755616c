"""What a task is. The step, the loop and the evaluation reach it through these functions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.data.batches import Batch, Examples
from train.data.tables import Table

Measured: TypeAlias = Mapping[str, np.ndarray]
"""What `Task.measure` returns, for all examples: arrays whose leading axis counts them."""


class Task(Protocol):
    """A task: from tables to examples, from a network's outputs to a loss, predictions and figures.

    Attributes:
      primary: the metric that tells which of two models is better.
      higher_is_better: whether it is the one with the higher value.
    """

    primary: str
    higher_is_better: bool

    def encode(self, table: Table) -> dict[str, Examples]:
        """A table as examples; several of them, by name, when they are shown in several ways."""
        ...

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What of a batch the network is given, by the names of its arguments."""
        ...

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """``(total, count)``: the loss summed over a batch, and over how many terms; both scalars, float32.

        ``smoothing`` is the share of a label's probability that is spread over all classes.
        """
        ...

    def measure(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """For each example what `metrics` and `predictions` need."""
        ...

    def metrics(self, measured: Measured) -> dict[str, float]:
        """Figures over all examples; `primary` is among them."""
        ...

    def predictions(self, measured: Measured) -> np.ndarray:
        """For each example what was predicted, in a form in which predictions can be compared."""
        ...


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, weights: jax.Array | None = None
) -> jax.Array:
    """The loss of each label, float32 [...], from logits [..., classes].

    With smoothing (Szegedy et al. 2015, section 7) the label has the probability 1 - smoothing, and all classes share
    the rest. With weights, [classes], each class's part of this is weighted by its own, as in PyTorch.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if weights is not None:
        losses = losses * weights[labels]
    if not smoothing:
        return losses
    each = jax.nn.log_softmax(logits)
    return (1 - smoothing) * losses - smoothing * (each if weights is None else each * weights).mean(axis=-1)
