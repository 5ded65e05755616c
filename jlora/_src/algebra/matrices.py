"""A weight and its factors as stacks of matrices, and their low-rank approximations. All in float32 or wider."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.named_axes import accumulation_dtype
from jlora._src.types import Array, Axes, LoraFactors, Target

_OVERSAMPLED = 8
"""Additional columns of a randomized SVD's basis (Halko et al. 2011 advise 5 to 10)."""


def to_matrices(weight: Array, axes: Axes) -> Array:
    """The weight as ``[*batch, inputs, outputs]``, float32, with all its input and all its output axes flattened."""
    batch, inputs, outputs = axes.sizes(weight.shape)
    moved = compat.to_device(weight).astype(jnp.float32).transpose(sum(axes, ()))
    return moved.reshape(*batch, math.prod(inputs), math.prod(outputs))


def from_matrices(matrices: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_matrices`, in the dtype of ``matrices``."""
    order = sum(axes, ())
    return matrices.reshape([shape[i] for i in order]).transpose([order.index(i) for i in range(len(shape))])


def to_factors(a: Array, b: Array, target: Target, dtype: str, scale: float | None = None) -> LoraFactors:
    """Factors in ``dtype`` from matrices ``a`` of shape ``[*batch, inputs, rank]`` and ``b``, ``[*batch, rank,
    outputs]``."""
    assert target.axes is not None
    batch, inputs, outputs = target.axes.sizes(target.shape)
    rank = a.shape[-1]
    a, b = a.reshape(*batch, *inputs, rank), b.reshape(*batch, rank, *outputs)
    scale = target.scale if scale is None else scale
    return LoraFactors(a.astype(dtype), b.astype(dtype), None, scale=scale, axes=target.axes, dropout=target.dropout)


def factor_matrices(factors: LoraFactors) -> tuple[Array, Array]:
    """``a`` as ``[*batch, inputs, rank]`` and ``b`` as ``[*batch, rank, outputs]``, float32 or wider; the scale stays
    apart."""
    a, b = (compat.to_device(x) for x in (factors.a, factors.b))
    a, b = (x.astype(accumulation_dtype(x.dtype)) for x in (a, b))
    n = len(factors.axes.batch)
    batch, inputs, outputs = a.shape[:n], a.shape[n:-1], b.shape[n + 1 :]
    return a.reshape(*batch, math.prod(inputs), factors.rank), b.reshape(*batch, factors.rank, math.prod(outputs))


def with_matrices(factors: LoraFactors, a: Array, b: Array, scale: float = 1.0) -> LoraFactors:
    """Other factors of the same weight, of any rank, from matrices as `factor_matrices` gives them."""
    n = len(factors.axes.batch)
    a = a.reshape(*factors.a.shape[:-1], a.shape[-1])
    b = b.reshape(*factors.b.shape[:n], b.shape[-2], *factors.b.shape[n + 1 :])
    return dataclasses.replace(factors, a=a, b=b, scale=scale)


def update(factors: LoraFactors) -> Array:
    """``scale · a·b``, summed in float32, as `to_matrices` would give it."""
    a, b = factor_matrices(factors)
    return (factors.scale * (a @ b)).astype(jnp.float32)


def joined(pairs: Sequence[tuple[LoraFactors, Any]]) -> tuple[Array, Array]:
    """Matrices ``a`` and ``b`` of the weighted sum of updates, float32 or wider: of the sum of the ranks, exact."""
    matrices = [factor_matrices(f) for f, _ in pairs]
    a = [a * jnp.asarray(f.scale * weight, a.dtype) for (a, _), (f, weight) in zip(matrices, pairs, strict=True)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate(a, -1), jnp.concatenate([b for _, b in matrices], -2)


def product_svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``(u, s, vh)`` of each ``a·b``, which is never formed: of both factors' triangular parts, times their bases.

    Args:
      a, b: ``[..., m, r]`` and ``[..., r, n]``.

    Returns:
      ``[..., m, k]``, ``[..., k]`` in descending order, ``[..., k, n]``, with ``k = min(m, r, n)``.
    """
    (left, a), (right, b) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
    u, s, vh = jnp.linalg.svd(a @ b.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


@functools.partial(jax.jit, static_argnames=("rank", "niter"))
def truncated_svd(
    matrices: Array, rank: int, niter: int | None = None, key: Array | None = None
) -> tuple[Array, Array, Array]:
    """``(u, s, vh)``: the first ``rank`` singular values of each matrix, in descending order, and their vectors.

    Exact; or, with ``niter``, randomized (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1):
    ``niter`` subspace iterations from a random start drawn with ``key``.

    Args:
      matrices: float32 ``[..., m, n]``.

    Returns:
      ``[..., m, rank]``, ``[..., rank]``, ``[..., rank, n]``.
    """
    with jax.default_matmul_precision("highest"):
        if niter is None:
            u, s, vh = jnp.linalg.svd(matrices, full_matrices=False)
        else:
            assert key is not None
            u, s, vh = _randomized_svd(matrices, rank, niter, key)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def _randomized_svd(matrices: Array, rank: int, niter: int, key: Array) -> tuple[Array, Array, Array]:
    *batch, m, n = matrices.shape
    width = min(rank + _OVERSAMPLED, m, n)
    # A transposed copy, made once: XLA:CPU takes ten times as long for a product with a transposed matrix.
    flipped = lax.optimization_barrier(matrices.mT)
    basis = jnp.linalg.qr(matrices @ jax.random.normal(key, (*batch, n, width)))[0]
    for _ in range(niter):
        basis = jnp.linalg.qr(flipped @ basis)[0]
        basis = jnp.linalg.qr(matrices @ basis)[0]
    # The SVD of a thin matrix and not of a wide one: that of its triangular factor.
    q, r = jnp.linalg.qr(flipped @ basis)
    u, s, vh = jnp.linalg.svd(r.mT, full_matrices=False)
    return basis @ u, s, vh @ q.mT


def balanced(u: Array, s: Array, vh: Array, scale: float) -> tuple[Array, Array]:
    """``(a, b)`` with ``scale · a·b = u·diag(s)·vh``, the singular values shared evenly between the two."""
    root = jnp.sqrt(s / scale)
    return u * root[..., None, :], root[..., :, None] * vh
