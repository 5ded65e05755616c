"""Examples in, batches of few shapes out, so that each shape is compiled once.

Examples and batches are columns by name. The order of the examples is a pure function of (seed, epoch): a run
can be repeated, resumed or split over processes without state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from train.data.ragged import Examples, Ragged
from train.data.truncation import Truncation

Batch: TypeAlias = Mapping[str, np.ndarray]


def size(examples: Examples) -> int:
    """The number of examples."""
    return len(next(iter(examples.values())))


def ragged_columns(examples: Examples) -> list[Ragged]:
    """The columns whose rows differ in length; in a task's examples they all have the same lengths."""
    return [column for column in examples.values() if isinstance(column, Ragged)]


def lengths(examples: Examples) -> np.ndarray | None:
    """The length of each example, int [n]; None if no column is ragged."""
    return next((column.lengths() for column in ragged_columns(examples)), None)


def longest(examples: Examples) -> int:
    """The length of the longest example; 0 if no column is ragged."""
    return max((column.longest for column in ragged_columns(examples)), default=0)


def truncation_of(examples: Examples) -> Truncation | None:
    """The tokens cut from texts; None for examples without texts."""
    return next((one.truncation for one in ragged_columns(examples) if one.truncation is not None), None)


def token_counts(examples: Examples, rows: np.ndarray) -> tuple[int, int]:
    """The numbers of tokens in these rows, and of those that carry loss; 0 without texts or a loss mask."""
    ragged = ragged_columns(examples)
    tokens = next((column.lengths(rows).sum() for column in ragged), 0)
    return int(tokens), int(next((one.counts[rows].sum() for one in ragged if one.counts is not None), 0))


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
    found = [int(column.lengths(rows).max(initial=0)) for column in ragged_columns(examples)]
    return (_bucket(buckets, max(found)),) if found else ()


def batch_of(examples: Examples, rows: np.ndarray, buckets: Sequence[int] = ()) -> Batch:
    """The examples ``rows`` as one batch; ragged columns are int32 [rows, shortest bucket that fits the longest]."""
    return {
        name: column.padded(rows, _bucket(buckets, int(column.lengths(rows).max(initial=0))))
        if isinstance(column, Ragged)
        else column[rows]
        for name, column in examples.items()
    }


def _bucket(buckets: Sequence[int], longest: int) -> int:
    return min((bucket for bucket in buckets if bucket >= longest), default=longest)
