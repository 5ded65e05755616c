"""Metrics and predictions of a model on all examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

import jlora
from train.compute.layouts import Layout
from train.data.batches import Batch, batch_of, bucket_of, ordered_rows, size
from train.data.ragged import Examples
from train.loop.stop import Stop, Stopped
from train.networks.network import Forward
from train.tasks.base import Measured, Task

Measure: TypeAlias = Callable[[Any, Any, Examples], Measured]
"""``measure(params, adapters, examples)``; adapters of None mean the plain model."""


def make_measure(
    layout: Layout,
    forward: Forward,
    task: Task,
    batch_size: int,
    buckets: Sequence[int] = (),
    stop: Stop | None = None,
) -> Measure:
    """``measure(params, adapters, examples)``: `Task.measure` of every example, in the examples' order.

    Compiles once per argument structure and bucket.

    Args:
      layout: of params and adapters.
      batch_size: examples per batch; rounded up to a multiple of the layout's parts.
      stop: checked before each batch; a request raises `train.loop.stop.Stopped`.
    """
    adapted = jlora.lora(forward)
    batch_size = -(-batch_size // layout.parts) * layout.parts

    def measure_batch(params: Any, adapters: Any, batch: Batch) -> dict[str, jax.Array]:
        inputs = task.inputs(batch)
        tree = params if adapters is None else jlora.attach(params, adapters, split_inputs={})
        return task.measure(adapted(tree, inputs), batch)

    compiled = layout.compile_rows(measure_batch)

    def measure(params: Any, adapters: Any, examples: Examples) -> Measured:
        found: dict[str, np.ndarray] = {}
        for rows, own in ordered_rows(examples, batch_size):
            if stop is not None and stop.requested():
                raise Stopped("stopped during an evaluation; the same command evaluates again", stop.code)
            bucket = bucket_of(examples, rows, buckets)
            batch = layout.place_batch(
                lambda part, rows=rows, bucket=bucket: batch_of(examples, rows[part], bucket), len(rows)
            )
            for name, values in compiled(params, adapters, batch).items():
                whole = found.setdefault(name, np.empty((size(examples), *values.shape[1:]), values.dtype))
                whole[rows[:own]] = values[:own]
        return found

    return measure


def evaluate_models(
    task: Task, models: Mapping[str, tuple[Any, Any]], measure: Measure, test: Mapping[str, Examples]
) -> tuple[dict[str, dict[str, dict[str, float]]], Callable[[str, str], int]]:
    """Evaluate several models on every set of test examples.

    Args:
      models: parameters and adapters (or None) by the model's name.
      test: examples by the name of their set.

    Returns:
      The metrics by model and set, and a function of two models' names that counts their differing predictions.
    """
    found = {
        model: {name: measure(params, adapters, examples) for name, examples in test.items()}
        for model, (params, adapters) in models.items()
    }

    def differing(first: str, second: str) -> int:
        pairs = ((task.predictions(found[first][name]), task.predictions(found[second][name])) for name in test)
        return sum(int(np.sum(one != other)) for one, other in pairs)

    metrics = {model: {name: task.metrics(one) for name, one in sets.items()} for model, sets in found.items()}
    return metrics, differing
