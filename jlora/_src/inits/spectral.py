"""Factors from a decomposition of the weight alone: PiSSA and OLoRA."""

from __future__ import annotations

import jax.numpy as jnp

from jlora._src.algebra.matrices import balanced, to_factors, to_matrices, truncated_svd
from jlora._src.types import Array, LoraFactors, Target


def pissa(
    weight: Array, target: Target, dtype: str, *, niter: int | None = None, key: Array | None = None
) -> LoraFactors:
    """The principal singular values and vectors (Meng et al. 2024, eqs. 2 and 3)."""
    assert target.axes is not None
    u, s, vh = truncated_svd(to_matrices(weight, target.axes), target.rank, niter, key)
    return to_factors(*balanced(u, s, vh, target.scale), target, dtype)


def olora(weight: Array, target: Target, dtype: str) -> LoraFactors:
    """The first columns and rows of a QR decomposition of the transposed weight (Büyükakyüz 2024, algorithm 1)."""
    assert target.axes is not None
    q, r = jnp.linalg.qr(to_matrices(weight, target.axes).mT)
    return to_factors(r[..., : target.rank, :].mT, q[..., : target.rank].mT, target, dtype)
