"""`select`: an adapter of a stack for each row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jlora._src.tree.stack import stacked_size
from jlora._src.types import Adapters, Array, LoraFactors, Path, RowAdapters

BASE = -1
"""The id of a row without an adapter."""


def select(stacked: Adapters, ids: ArrayLike | Sequence[int], *, group_size: int = 1) -> dict[Path, RowAdapters]:
    """Row i of a batch gets adapter ``ids[i]`` of a stack, or with the id -1 none: a batch with mixed adapters.

    >>> stacked = jlora.stack([first, second, third])
    >>> logits = apply(jlora.attach(params, jlora.select(stacked, [0, 2, 0, -1])), tokens)

    Here `lora` runs its function once for all rows, and each gives what it gives alone. The rows must be on the first
    axis of every other argument and of the results; for any other place, see `per_row`. The ids may be traced, so other
    ids compile nothing. Gradients with respect to ``stacked`` are those of each adapter's own rows.

    By default the factors are gathered for each row, so the memory of the factors grows with the rows. With
    ``group_size`` the rows are sorted by id and divided into groups of that many rows with one adapter, and the
    factors are gathered for each group. A group that is not full repeats a row, so at most
    ``rows + (n + 2) * (group_size - 1)`` rows are computed for a stack of n. It pays for many rows and few adapters.

    Args:
      stacked: from `stack`.
      ids: int [rows], from 0 to n - 1, or -1 for the base alone. A traced id that is not there gives NaN.
      group_size: how many rows share one copy of the factors.

    Returns:
      ``{path: RowAdapters}`` for `attach`.

    Raises:
      ValueError: if ids are not integers [rows] or are out of range, ``group_size`` is below 1, or ``stacked`` is no
        stack, listing every path.
      TypeError: if a value of ``stacked`` is neither factors nor an array.
    """
    n = stacked_size(stacked, "select")
    ids = _checked_ids(ids, n)
    if group_size < 1:
        raise ValueError(f"select: group_size = {group_size}; expected at least 1")
    groups = _Groups(ids) if group_size == 1 else _grouped(ids, n, group_size)
    adapted = groups.ids != BASE

    def gather(x: Array, axis: int) -> Array:
        index = jnp.where(adapted, groups.ids, 0)
        found = jnp.asarray(x).at[index].get(mode="fill", wrap_negative_indices=False)
        found = jnp.where(adapted.reshape(-1, *(1,) * (found.ndim - 1)), found, jnp.zeros_like(found))
        return jnp.moveaxis(found, 0, axis)

    def one(value: LoraFactors | Array) -> RowAdapters:
        stack = RowAdapters(value, adapted, groups.rows, groups.places)
        return dataclasses.replace(stack, value=jax.tree.map(lambda x: gather(x, stack.axis), value))

    return {path: one(value) for path, value in stacked.items()}


class _Groups(NamedTuple):
    """The adapter of each group of rows; ``rows`` and ``places`` as in `RowAdapters`."""

    ids: Array
    rows: Array | None = None
    places: Array | None = None


def _grouped(ids: Array, n: int, size: int) -> _Groups:
    """The rows sorted by id, in groups of ``size``."""
    kind = jnp.where((ids < BASE) | (ids >= n), n, ids) - BASE  # the base first, ids that are not there last
    kinds, rows = n + 2, ids.shape[0]
    order = jnp.argsort(kind)
    count = jnp.bincount(kind, length=kinds)
    start = jnp.cumsum(count) - count  # in the sorted rows
    taken = -(-count // size)  # groups
    end = jnp.cumsum(taken)
    first = end - taken
    places = jnp.zeros_like(ids).at[order].set(jnp.arange(rows, dtype=ids.dtype) - start[kind[order]])
    places += first[kind] * size

    group = jnp.arange((rows + min(kinds, rows) * (size - 1)) // size)
    used = group < end[-1]
    own = jnp.where(used, jnp.searchsorted(end, group, side="right"), kind[order[0]])
    step = jnp.where(used, group - first[own], 0)
    within = jnp.minimum(step[:, None] * size + jnp.arange(size), count[own][:, None] - 1)
    return _Groups((own + BASE).astype(jnp.int32), order[start[own][:, None] + within], places)


def _checked_ids(ids: ArrayLike | Sequence[int], n: int) -> Array:
    """``ids`` as int32; raises a ValueError for any that are not there."""
    given: Any = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if given.ndim != 1 or not given.size or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"select: got ids of shape {given.shape} and dtype {given.dtype}; expected integers [rows]")
    if not isinstance(given, Tracer) and ((low := int(given.min())) < BASE or int(given.max()) >= n):
        raise ValueError(
            f"select: got ids from {low} to {int(given.max())} for a stack of {n}; expected 0 to {n - 1}, or {BASE} "
            "for a row without an adapter"
        )
    return jnp.asarray(given, jnp.int32)
