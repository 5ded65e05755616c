"""The interface of a task: all that the step, the loop and the evaluation use of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.data.batches import Batch
from train.data.ragged import Examples
from train.data.tables import Table
from train.tasks.encoding import Draft

Measured: TypeAlias = Mapping[str, np.ndarray]
"""The results of `Task.measure` over all examples: arrays [n, ...]."""


class Task(Protocol):
    """Tables in, examples out; outputs of a network in, loss, metrics and predictions out.

    Attributes:
      primary: the metric for comparing models.
      higher_is_better: whether higher is better.
    """

    primary: str
    higher_is_better: bool

    def encode(self, table: Table, draft: Draft | None = None) -> dict[str, Examples]:
        """A table as examples by domain name; most tasks have a single domain, ``""``. Without a draft, in memory."""
        ...

    def inputs(self, batch: Batch, smoothing: float = 0.0) -> dict[str, Any]:
        """The network's arguments, by name; ``smoothing`` is as in `loss`, for networks that compute the loss."""
        ...

    def loss(self, outputs: Any, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """``(total, count)``: the summed loss of a batch, and the (weighted) number of its terms; float32 scalars.

        ``smoothing`` is the share of a label's probability spread over all classes.
        """
        ...

    def measure(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """The inputs of `metrics` and `predictions`, per example."""
        ...

    def metrics(self, measured: Measured) -> dict[str, float]:
        """Metrics over all examples, `primary` among them."""
        ...

    def predictions(self, measured: Measured) -> np.ndarray:
        """The prediction for each example, [n, ...], with equal values for equal predictions."""
        ...


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, weights: jax.Array | None = None
) -> jax.Array:
    """The loss of each label, float32 [...], from logits [..., classes].

    With smoothing (Szegedy et al. 2015, section 7) the label has the probability 1 - smoothing, and all classes share
    the rest. With weights, [classes], each class's term is multiplied by its weight, as in PyTorch.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if weights is not None:
        losses = losses * weights[labels]
    if not smoothing:
        return losses
    each = jax.nn.log_softmax(logits)
    return (1 - smoothing) * losses - smoothing * (each if weights is None else each * weights).mean(axis=-1)
