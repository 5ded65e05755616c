"""Attention with all scores in memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scoring(NamedTuple):
    """How scores become weights.

    Attributes:
      scale: of the scores, usually ``dim ** -0.5``.
      softcap: None, or the bound c of ``c * tanh(score / c)`` (Gemma 2).
      rate: the probability of dropping a weight.
      key: a PRNG key for that; None drops none.
    """

    scale: float
    softcap: float | None = None
    rate: float = 0.0
    key: jax.Array | None = None


def plain(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array | None, scoring: Scoring) -> jax.Array:
    """[batch, length, heads, dim], in the dtype of ``query``; scores and softmax are float32.

    Args:
      query: [batch, length, heads, dim].
      key, value: [batch, slots, key heads, dim], where the key heads divide the heads.
      allowed: None, or booleans that broadcast to [batch, length, slots]: which keys a query sees.
    """
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    if allowed is not None:
        # Not -inf: a row without keys (padding) would be NaN, and so would its gradient.
        scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = _dropped(jax.nn.softmax(scores, axis=-1).astype(query.dtype), scoring)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, dim)


def _dropped(weights: jax.Array, scoring: Scoring) -> jax.Array:
    if scoring.key is None or not scoring.rate:
        return weights
    kept = jax.random.bernoulli(scoring.key, 1 - scoring.rate, weights.shape)
    return jnp.where(kept, weights / (1 - scoring.rate), 0)
