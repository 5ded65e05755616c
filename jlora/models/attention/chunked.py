"""Attention of some queries at a time: the memory of the scores does not grow with the square of the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring, plain

_SCORES = 2**18
"""Scores of one head and one sequence that are held at once; 1 MiB."""


def chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, window: int | None, scoring: Scoring
) -> jax.Array:
    """What `plain` gives for this mask and window. The backward pass computes each chunk's weights again."""
    length, slots = mask.length, mask.slots
    rows = _rows(length, slots)
    chunks = -(-length // rows)
    # A chunk's window ends with its last query.
    span = slots if window is None else min(slots, window + rows - 1)

    def divide(x: jax.Array) -> jax.Array:
        """[batch, length, ...] to [chunks, batch, rows, ...]."""
        x = jnp.pad(x, [(0, 0), (0, chunks * rows - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, rows, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend(
        key: jax.Array, value: jax.Array, number: jax.Array, query: jax.Array, of: jax.Array | None
    ) -> jax.Array:
        positions = jnp.arange(rows) + number * rows + (0 if mask.start is None else mask.start)
        first = jnp.clip(positions[0] - (span - rows), 0, slots - span)

        def near(x: jax.Array) -> jax.Array:
            return x if span == slots else jax.lax.dynamic_slice_in_dim(x, first, span, axis=1)

        near_slots = first + jnp.arange(span)
        seen = mask.visible(positions, near_slots, of, None if mask.keys is None else near(mask.keys))
        if window is not None and seen is not None:
            seen = seen & (positions[:, None] - near_slots < window)
        own = scoring if scoring.key is None else scoring._replace(key=jax.random.fold_in(scoring.key, number))
        key, value = (near(x).astype(query.dtype) for x in (key, value))
        return plain(query, key, value, seen, own)

    # In float32, so that the gradients of keys and values, sums over the chunks, are not rounded at every chunk.
    wide = tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (key, value))
    parts = jnp.arange(chunks), divide(query), None if mask.queries is None else divide(mask.queries)
    _, found = jax.lax.scan(lambda _, part: (None, attend(*wide, *part)), None, parts)
    return jnp.moveaxis(found, 0, 1).reshape(query.shape[0], chunks * rows, *query.shape[2:])[:, :length]


def _rows(length: int, slots: int) -> int:
    """Queries of a chunk."""
    return min(length, max(16, min(512, _SCORES // slots)))
