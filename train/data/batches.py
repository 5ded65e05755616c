"""From examples to batches of few shapes, so that each shape is compiled once and nothing later.

Examples are columns by name, and so is a batch. Which example comes when is a pure function of (seed, epoch): a run can
be repeated, resumed, or split over processes without any state to carry.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from train.data.cuts import Cut


class Ragged(list[np.ndarray]):
    """A column of arrays [length] whose lengths differ; in a batch they are filled up with ``fill``.

    Attributes:
      fill: the value behind the end, or before the start where ``left``.
      cut: what was cut of them, where they are texts that were.
    """

    def __init__(
        self, values: Sequence[Sequence[int] | np.ndarray], fill: int, *, left: bool = False, cut: Cut | None = None
    ):
        super().__init__(np.asarray(value, np.int32) for value in values)
        self.fill = fill
        self.left = left
        self.cut = cut


Examples: TypeAlias = Mapping[str, np.ndarray | Ragged]
Batch: TypeAlias = Mapping[str, np.ndarray]


def size(examples: Examples) -> int:
    """How many examples there are."""
    return len(next(iter(examples.values())))


def lengths(examples: Examples) -> np.ndarray | None:
    """The length of every example, int [n]; None when no column is ragged."""
    ragged = next((column for column in examples.values() if isinstance(column, Ragged)), None)
    return None if ragged is None else np.array([len(value) for value in ragged])


def cut_of(examples: Examples) -> Cut | None:
    """What was cut of texts; None for examples that are none."""
    return next((one.cut for one in examples.values() if isinstance(one, Ragged) and one.cut is not None), None)


def quarters(max_length: int) -> tuple[int, ...]:
    """The default buckets: four quarters of ``max_length``, rounded up to a multiple of 8 where that is no longer."""
    return tuple(sorted({min(max_length, -(-max_length * i // 32) * 8) for i in (1, 2, 3, 4)}))


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which ``count`` examples are seen in an epoch: a function of its arguments and nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of ``count`` examples are in the batch of ``step``, from 0; an incomplete last batch is left out."""
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch + 1)[batch * batch_size : (batch + 1) * batch_size]


def ordered_rows(examples: Examples, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All examples, those of one length together, as ``(rows, own)`` of each batch.

    A batch has ``batch_size`` rows, of which the first ``own`` are its own; the last is filled up with its last row.
    """
    count, long = size(examples), lengths(examples)
    order = np.arange(count) if long is None else np.argsort(long, kind="stable")
    for start in range(0, count, batch_size):
        own = min(batch_size, count - start)
        yield order[np.minimum(np.arange(start, start + batch_size), count - 1)], own


def bucket_of(examples: Examples, rows: np.ndarray, buckets: Sequence[int]) -> tuple[int, ...]:
    """The bucket of a batch, for `batch_of` of any part of its rows; none when no column is ragged."""
    longest = [max(len(column[row]) for row in rows) for column in examples.values() if isinstance(column, Ragged)]
    return (_shortest(buckets, max(longest)),) if longest else ()


def batch_of(examples: Examples, rows: np.ndarray, buckets: Sequence[int] = ()) -> Batch:
    """The examples ``rows`` as one batch, ragged columns as int32 [rows, shortest bucket that holds the longest]."""
    batch = {}
    for name, column in examples.items():
        if not isinstance(column, Ragged):
            batch[name] = column[rows]
            continue
        values = [column[row] for row in rows]
        length = _shortest(buckets, max(map(len, values)))
        out = np.full((len(rows), length), column.fill, np.int32)
        for line, value in zip(out, values, strict=True):
            line[length - len(value) if column.left else 0 :][: len(value)] = value
        batch[name] = out
    return batch


def _shortest(buckets: Sequence[int], longest: int) -> int:
    return min((bucket for bucket in buckets if bucket >= longest), default=longest)
