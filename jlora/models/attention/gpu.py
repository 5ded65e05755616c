"""Attention on a GPU: cuDNN's, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring


def has_cudnn() -> bool:
    """Whether JAX's devices are of a platform that has cuDNN."""
    return "cuda" in get_backend().platform_version


def fits(query: jax.Array, mask: Mask, window: int | None, scoring: Scoring) -> bool:
    """Whether cuDNN computes it: half precision, heads of at most 128, one segment, no soft cap; and a window only
    without padding."""
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] <= 128
        and query.shape[-1] % 8 == 0
        and scoring.softcap is None
        and not mask.packed
        and (window is None or mask.keys is None)
    )


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    window: int | None,
    scoring: Scoring,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """What `plain` gives for this mask and window, at tokens that are not padding. Without dropout and without a cache.

    cuDNN knows padding at the end only: tokens are moved to the front, in their order, and the results back.
    """
    order = count = None
    if mask.keys is not None:
        real = jnp.broadcast_to(mask.keys >= 0, query.shape[:2])
        order, count = jnp.argsort(~real, axis=1, stable=True), real.sum(axis=1, dtype=jnp.int32)
        query, key, value = (_taken(x, order) for x in (query, key, value))
    found = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scoring.scale,
        is_causal=mask.causal,
        query_seq_lengths=count,
        key_value_seq_lengths=count,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return found if order is None else _taken(found, jnp.argsort(order, axis=1))


def _taken(x: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)
