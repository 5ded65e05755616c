"""The batch of each training step: a pure function of the step, built ahead of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from train.compute.layouts import Layout
from train.data.batches import batch_of, bucket_of, size, token_counts, training_rows
from train.data.ragged import Examples
from train.loop.state import StepCounts

AHEAD = 2
"""Batches that are built ahead of their steps, where these do not run on the host's own cores."""


class StepInput(NamedTuple):
    """The batch of a training step.

    Attributes:
      batch: its arrays, placed by the layout.
      shape: ``(rows, padded length)``, or ``(rows,)`` without texts. Steps of one shape share a compiled program.
      counts: the size of the step's computation.
    """

    batch: Any
    shape: tuple[int, ...]
    counts: StepCounts


class Feed:
    """The batches of training. A thread builds and places them while the devices compute; `close` ends it.

    Where the devices are the host's own cores there is no thread, which would only take these from the steps.

    Args:
      build: the input of a step, counted from 0.
      on_host: whether the devices are the host's own cores.
    """

    def __init__(self, build: Callable[[int], StepInput], *, on_host: bool):
        self._build = build
        self._thread = None if on_host else ThreadPoolExecutor(1, "input")
        self._ahead: deque[tuple[int, Future[StepInput]]] = deque()

    def input(self, step: int, last: int) -> StepInput:
        """The batch of a step, counted from 0; a thread builds those of the next steps before ``last`` meanwhile.

        Raises what building it raised, with its traceback.
        """
        return self._build(step) if self._thread is None else self._built_ahead(self._thread, step, last)

    def _built_ahead(self, thread: ThreadPoolExecutor, step: int, last: int) -> StepInput:
        while self._ahead and self._ahead[0][0] != step:
            self._ahead.popleft()[1].cancel()
        for later in range(step + len(self._ahead), min(step + 1 + AHEAD, last)):
            self._ahead.append((later, thread.submit(self._build, later)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """End the thread: the batch that it builds is the last one."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


class Batches:
    """The input of each step of a run, for a `Feed`.

    Args:
      examples: to train on.
      layout: where batches are placed. Each process reads only the rows of its own devices.
      buckets: the padded lengths of batches.
      seed: of the examples' order.
      ideal_seconds: the time of a step at the devices' peak, by the batch's shape; 0 if that is unknown.
    """

    def __init__(
        self,
        examples: Examples,
        layout: Layout,
        batch_size: int,
        buckets: Sequence[int],
        seed: int,
        ideal_seconds: Callable[[tuple[int, ...]], float],
    ):
        self._examples, self._layout, self._batch_size = examples, layout, batch_size
        self._buckets, self._seed, self._ideal_seconds = buckets, seed, ideal_seconds

    def rows(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, counted from 0."""
        return training_rows(size(self._examples), self._batch_size, self._seed, step)

    def __call__(self, step: int) -> StepInput:
        rows = self.rows(step)
        bucket = bucket_of(self._examples, rows, self._buckets)
        shape = (len(rows), *bucket)
        batch = self._layout.place_batch(lambda part: batch_of(self._examples, rows[part], bucket), len(rows))
        counts = counts_of(self._examples, rows, bucket)
        return StepInput(batch, shape, counts._replace(ideal_seconds=self._ideal_seconds(shape)))


def counts_of(examples: Examples, rows: np.ndarray, bucket: tuple[int, ...]) -> StepCounts:
    """The size of a batch of these rows, padded to a bucket, without its time."""
    tokens, loss_tokens = token_counts(examples, rows)
    padded = math.prod((len(rows), *bucket)) if bucket else 0
    return StepCounts(len(rows), tokens, 0.0, padded_tokens=padded, loss_tokens=loss_tokens)
