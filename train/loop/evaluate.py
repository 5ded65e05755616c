"""What a model makes of all examples: figures, and predictions to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

import jlora
from train.compute.layouts import Layout
from train.data.batches import Batch, Examples, batch_of, bucket_of, ordered_rows, size
from train.loop.stop import Stop
from train.networks.network import Forward
from train.tasks.base import Measured, Task

Measure: TypeAlias = Callable[[Any, Any, Examples], Measured]
"""``measure(params, adapters, examples)``, of the plain model where the adapters are None."""


def make_measure(
    layout: Layout,
    forward: Forward,
    task: Task,
    batch_size: int,
    buckets: Sequence[int] = (),
    stop: Stop | None = None,
) -> Measure:
    """``measure(params, adapters, examples)``: what `Task.measure` finds of every example, in the examples' order.

    Compiled once for each structure of its arguments and each bucket.

    Args:
      layout: where params and adapters lie.
      batch_size: examples at once; rounded up so that the layout can divide them.
      stop: asked after each batch; measuring then ends with a `train.loop.stop.Stopped`.
    """
    adapted = jlora.lora(forward)
    batch_size = -(-batch_size // layout.parts) * layout.parts

    def measure_batch(params: Any, adapters: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = task.inputs(batch)
        outputs = forward(params, inputs) if adapters is None else adapted(jlora.attach(params, adapters), inputs)
        return task.measure(outputs, batch)

    compiled = layout.compile_rows(measure_batch)

    def measure(params: Any, adapters: Any, examples: Examples) -> Measured:
        found: dict[str, np.ndarray] = {}
        for rows, own in ordered_rows(examples, batch_size):
            if stop is not None and stop.asked():
                raise stop.stopped("stopped while it was measured, as asked; the same command measures it again")
            bucket = bucket_of(examples, rows, buckets)
            batch = layout.place_batch(
                lambda part, rows=rows, bucket=bucket: batch_of(examples, rows[part], bucket), len(rows)
            )
            for name, values in compiled(params, adapters, batch).items():
                whole = found.setdefault(name, np.empty((size(examples), *values.shape[1:]), values.dtype))
                whole[rows[:own]] = values[:own]
        return found

    return measure


def compare(
    task: Task, models: Mapping[str, tuple[Any, Any]], measure: Measure, test: Mapping[str, Examples]
) -> tuple[dict[str, dict[str, dict[str, float]]], Callable[[str, str], int]]:
    """Several models on every set of test examples.

    Args:
      models: by name, parameters and adapters, or None.
      test: examples by the name of their set.

    Returns:
      The figures by model and set, and a function of two models' names: how many of their predictions differ.
    """
    found = {
        model: {name: measure(params, adapters, examples) for name, examples in test.items()}
        for model, (params, adapters) in models.items()
    }

    def differing(first: str, second: str) -> int:
        pairs = ((task.predictions(found[first][name]), task.predictions(found[second][name])) for name in test)
        return sum(int(np.sum(one != other)) for one, other in pairs)

    figures = {model: {name: task.metrics(one) for name, one in sets.items()} for model, sets in found.items()}
    return figures, differing
