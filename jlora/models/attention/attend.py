"""`attend`: scaled dot-product attention in the form that suits length and device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jlora.models.attention import gpu, tpu
from jlora.models.attention.chunked import chunked
from jlora.models.attention.mask import Mask, platform_of
from jlora.models.attention.plain import Scoring, plain


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    scoring: Scoring,
    window: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention; each key head serves a group of query heads (Ainslie et al. 2023).

    Args:
      query: [batch, length, heads, dim].
      key, value: [batch, slots, key heads, dim], where the key heads divide the heads.
      mask: the keys that each query sees, and whether all scores may be held at once.
      window: int32 scalar, which of ``mask.windows`` this layer has; None for the only one.

    Returns:
      [batch, length, heads, dim], in the dtype of ``query``; scores and softmax are float32. The results of queries
      that are padding have no meaning.
    """
    if not mask.flash:
        return plain(query, key, value, _within(mask, window), scoring)
    forms = [partial(_flash, mask=mask, window=size, scoring=scoring) for size in mask.windows]
    if window is None:
        return forms[0](query, key, value)
    return jax.lax.switch(window, forms, query, key, value)


def _within(mask: Mask, window: jax.Array | None) -> jax.Array | None:
    """``mask.allowed`` in a window."""
    sizes = [mask.slots + mask.length if size is None else size for size in mask.windows]
    if mask.allowed is None or mask.windows == (None,):
        return mask.allowed
    size = sizes[0] if window is None else jnp.asarray(sizes, jnp.int32)[window]
    return mask.allowed & (mask.rows[:, None] - jnp.arange(mask.slots) < size)


def _flash(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, window: int | None, scoring: Scoring
) -> jax.Array:
    """Without all scores: a kernel of the device where there is one, else in chunks."""
    has_kernel = mask.start is None and (scoring.key is None or not scoring.rate)
    platform = platform_of(query)
    if has_kernel and platform == "tpu":
        return tpu.splash(query, key, value, mask, window, scoring)
    if has_kernel and platform == "gpu" and gpu.has_cudnn() and gpu.fits(query, mask, window, scoring):
        return gpu.cudnn(query, key, value, mask, window, scoring)
    return chunked(query, key, value, mask, window, scoring)
