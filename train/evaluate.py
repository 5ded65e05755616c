"""What a model makes of all examples: figures, and predictions to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from train.batches import Batch, Examples, ordered_batches, size
from train.networks import Forward
from train.tasks import Measured, Task

Measure = Callable[[Any, Examples], Measured]


def make_measure(forward: Forward, task: Task, batch_size: int, buckets: Sequence[int] = ()) -> Measure:
    """``measure(params, examples)``: what `Task.measure` finds of every example, in the examples' order.

    Compiled once for each structure of ``params`` and each bucket.
    """

    @jax.jit
    def measure_batch(params: Any, batch: Batch) -> dict[str, jax.Array]:
        return task.measure(forward(params, task.inputs(batch)), batch)

    def measure(params: Any, examples: Examples) -> Measured:
        found: dict[str, np.ndarray] = {}
        for rows, batch in ordered_batches(examples, batch_size, buckets):
            for name, values in jax.device_get(measure_batch(params, batch)).items():
                whole = found.setdefault(name, np.empty((size(examples), *values.shape[1:]), values.dtype))
                whole[rows] = values[: len(rows)]
        return found

    return measure


def compare(
    task: Task, models: Mapping[str, tuple[Measure, Any]], test: Mapping[str, Examples]
) -> tuple[dict[str, dict[str, dict[str, float]]], Callable[[str, str], int]]:
    """Several models on every set of test examples.

    Args:
      models: by name, how each is measured, and its parameters.
      test: examples by the name of their set.

    Returns:
      The figures by model and set, and a function of two models' names: how many of their predictions differ.
    """
    found = {
        model: {name: measure(params, examples) for name, examples in test.items()}
        for model, (measure, params) in models.items()
    }

    def differing(first: str, second: str) -> int:
        pairs = ((task.predictions(found[first][name]), task.predictions(found[second][name])) for name in test)
        return sum(int(np.sum(one != other)) for one, other in pairs)

    figures = {model: {name: task.metrics(one) for name, one in sets.items()} for model, sets in found.items()}
    return figures, differing
