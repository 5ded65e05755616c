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
        self._thread = None if layout.on_host else ThreadPoolExecutor(1, "input")
        self._ahead: deque[tuple[int, Future[StepInput]]] = deque()

    def rows(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, counted from 0."""
        return training_rows(size(self._examples), self._batch_size, self._seed, step)

    def input(self, step: int, last: int) -> StepInput:
        """The batch of a step, counted from 0; a thread builds those of the next steps before ``last`` meanwhile.

        Raises what building it raised, with its traceback.
        """
        one = self._build(step) if self._thread is None else self._built_ahead(self._thread, step, last)
        return one._replace(counts=one.counts._replace(ideal_seconds=self._ideal_seconds(one.shape)))

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

    def _build(self, step: int) -> StepInput:
        rows = self.rows(step)
        bucket = bucket_of(self._examples, rows, self._buckets)
        shape = (len(rows), *bucket)
        tokens, loss_tokens = token_counts(self._examples, rows)
        padded = math.prod(shape) if bucket else 0
        counts = StepCounts(len(rows), tokens, 0.0, padded_tokens=padded, loss_tokens=loss_tokens)
        batch = self._layout.place_batch(lambda part: batch_of(self._examples, rows[part], bucket), len(rows))
        return StepInput(batch, shape, counts)
