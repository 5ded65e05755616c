"""Weighted sums of tensors from which some entries are left out: TIES, DARE and magnitude pruning."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jlora._src.types import Array


class Rule(NamedTuple):
    """How tensors are combined to one.

    Attributes:
      pruned: which entries are left out: none, those of least magnitude, or random ones (the rest is then divided by
        ``density``).
      elects: whether each entry takes the mean over the tensors that have the sign of the majority, not the sum.
      density: the share of entries kept.
      majority_sign: whether the majority is that of the sum of the entries, or that of their number.
    """

    pruned: Literal["none", "magnitude", "random"] = "none"
    elects: bool = False
    density: float = 1.0
    majority_sign: Literal["total", "frequency"] = "total"


def combined(tensors: Array, weights: Array, rule: Rule, key: Array | None) -> Array:
    """One tensor from several, ``[n, ...]`` to ``[...]``.

    TIES trims, elects a sign and averages (Yadav et al. 2023, algorithm 1); the weights multiply the entries after the
    election, as in PEFT. DARE drops and rescales (Yu et al. 2023, equation 2).

    Args:
      weights: ``[n]``.
      key: draws the entries that are left out, if these are random.
    """
    kept = _pruned(tensors, rule, key)
    weighted = weights.astype(kept.dtype).reshape(-1, *(1 for _ in kept.shape[1:])) * kept
    if not rule.elects:
        return weighted.sum(0)
    signs = jnp.sign(kept)
    votes = kept if rule.majority_sign == "total" else signs
    agree = signs == jnp.where(votes.sum(0) >= 0, 1, -1).astype(kept.dtype)
    return jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0).astype(kept.dtype), 1)


def _pruned(tensors: Array, rule: Rule, key: Array | None) -> Array:
    if rule.pruned == "none" or rule.density == 1:
        return tensors
    if rule.pruned == "magnitude":
        return jnp.stack([jnp.where(largest(x, rule.density), x, 0) for x in tensors])
    assert key is not None
    return jnp.where(random_mask(key, tensors.shape, rule.density), tensors / rule.density, 0)


def largest(x: Array, density: float) -> Array:
    """A mask of the share ``density`` of the entries, rounded down in number, that are largest in magnitude; of equal
    ones the first."""
    order = jnp.argsort(-jnp.abs(x).ravel(), stable=True)
    mask = jnp.zeros(x.size, bool).at[order[: int(density * x.size)]].set(True)
    return mask.reshape(x.shape)


def random_mask(key: Array, shape: tuple[int, ...], density: float) -> Array:
    """A mask of independent entries, each of them kept with probability ``density``."""
    return jax.random.bernoulli(key, density, shape)
