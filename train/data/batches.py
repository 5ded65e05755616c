"""Examples in, batches of few shapes out, so that each shape is compiled once.

Examples and batches are columns by name. The order of the examples is a pure function of (seed, epoch): a run
can be repeated, resumed or split over processes without state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from train.data.truncation import Truncation


class Ragged(list[np.ndarray]):
    """A column of int32 arrays [length] of different lengths, which batches pad.

    Attributes:
      fill: the padding value.
      left: whether padding precedes the values.
      truncation: the tokens cut from texts; None for other columns.
    """

    def __init__(
        self,
        values: Sequence[Sequence[int] | np.ndarray],
        fill: int,
        *,
        left: bool = False,
        truncation: Truncation | None = None,
    ):
        super().__init__(np.asarray(value, np.int32) for value in values)
        self.fill = fill
        self.left = left
        self.truncation = truncation


Examples: TypeAlias = Mapping[str, np.ndarray | Ragged]
Batch: TypeAlias = Mapping[str, np.ndarray]


def size(examples: Examples) -> int:
    """The number of examples."""
    return len(next(iter(examples.values())))


def lengths(examples: Examples) -> np.ndarray | None:
    """The length of each example, int [n]; None if no column is ragged."""
    ragged = next((column for column in examples.values() if isinstance(column, Ragged)), None)
    return None if ragged is None else np.array([len(value) for value in ragged])


def truncation_of(examples: Examples) -> Truncation | None:
    """The tokens cut from texts; None for examples without texts."""
    found = (column.truncation for column in examples.values() if isinstance(column, Ragged))
    return next((one for one in found if one is not None), None)


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Four quarters of ``max_length``, each rounded up to a multiple of 8, at most ``max_length``."""
    return tuple(sorted({min(max_length, -(-max_length * i // 32) * 8) for i in (1, 2, 3, 4)}))


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``count`` examples, int [count], that depends only on these arguments."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def training_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples in the batch of ``step`` (from 0), int [batch_size]; an epoch's incomplete last batch is dropped."""
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch + 1)[batch * batch_size : (batch + 1) * batch_size]


def ordered_rows(examples: Examples, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All examples, sorted by length, as ``(rows, own)`` for each batch.

    ``rows``, int [batch_size], index the examples. The last batch is filled by repeating its last row; only its first
    ``own`` rows count.
    """
    count, long = size(examples), lengths(examples)
    order = np.arange(count) if long is None else np.argsort(long, kind="stable")
    for start in range(0, count, batch_size):
        own = min(batch_size, count - start)
        yield order[np.minimum(np.arange(start, start + batch_size), count - 1)], own


def bucket_of(examples: Examples, rows: np.ndarray, buckets: Sequence[int]) -> tuple[int, ...]:
    """The bucket of a batch, so that `batch_of` pads every part of its rows alike; empty if no column is ragged."""
    longest = [max(len(column[row]) for row in rows) for column in examples.values() if isinstance(column, Ragged)]
    return (_bucket(buckets, max(longest)),) if longest else ()


def batch_of(examples: Examples, rows: np.ndarray, buckets: Sequence[int] = ()) -> Batch:
    """The examples ``rows`` as one batch; ragged columns are int32 [rows, shortest bucket that fits the longest]."""
    batch = {}
    for name, column in examples.items():
        if not isinstance(column, Ragged):
            batch[name] = column[rows]
            continue
        values = [column[row] for row in rows]
        length = _bucket(buckets, max(map(len, values)))
        out = np.full((len(rows), length), column.fill, np.int32)
        for line, value in zip(out, values, strict=True):
            line[length - len(value) if column.left else 0 :][: len(value)] = value
        batch[name] = out
    return batch


def _bucket(buckets: Sequence[int], longest: int) -> int:
    return min((bucket for bucket in buckets if bucket >= longest), default=longest)
