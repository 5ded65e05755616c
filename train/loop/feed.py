"""The batch of each training step: a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.compute.layouts import Layout
from train.data.batches import batch_of, bucket_of, lengths, size, training_rows
from train.data.ragged import Examples
from train.loop.state import StepCounts


class StepInput(NamedTuple):
    """The examples of a training step.

    Attributes:
      rows: indices of the examples, int [batch].
      bucket: their padded length, as a tuple; empty without texts.
      counts: the size of the step's computation.
    """

    rows: np.ndarray
    bucket: tuple[int, ...]
    counts: StepCounts

    @property
    def shape(self) -> tuple[int, ...]:
        """Steps of one shape share a compiled program."""
        return len(self.rows), *self.bucket


class Feed:
    """The batches of training.

    Args:
      examples: to train on.
      buckets: the padded lengths of batches.
      seed: of the examples' order.
      ideal_seconds: the time of a step at the devices' peak, by the batch's shape; 0 if that is unknown.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        buckets: Sequence[int],
        seed: int,
        ideal_seconds: Callable[[tuple[int, ...]], float],
    ):
        self._examples, self._batch_size, self._buckets, self._seed = examples, batch_size, buckets, seed
        self._lengths, self._ideal_seconds = lengths(examples), ideal_seconds

    def rows(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, counted from 0."""
        return training_rows(size(self._examples), self._batch_size, self._seed, step)

    def input(self, step: int) -> StepInput:
        """The examples of a step, counted from 0."""
        rows = self.rows(step)
        bucket = bucket_of(self._examples, rows, self._buckets)
        shape = (len(rows), *bucket)
        tokens, padded = (0, 0) if self._lengths is None else (int(self._lengths[rows].sum()), math.prod(shape))
        return StepInput(rows, bucket, StepCounts(len(rows), tokens, self._ideal_seconds(shape), padded))

    def place(self, layout: Layout, one: StepInput) -> Any:
        """The batch on the devices."""
        return layout.place_batch(lambda part: batch_of(self._examples, one.rows[part], one.bucket), len(one.rows))
