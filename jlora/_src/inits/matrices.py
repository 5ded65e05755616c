"""A weight as a stack of matrices, and their low-rank approximations. All in float32."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
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


def update(factors: LoraFactors, shape: tuple[int, ...]) -> Array:
    """``scale · a·b`` of a weight of ``shape``, summed in float32, as `to_matrices` would give it."""
    batch, inputs, outputs = factors.axes.sizes(shape)
    a = factors.a.astype(jnp.float32).reshape(*batch, math.prod(inputs), factors.rank)
    b = factors.b.astype(jnp.float32).reshape(*batch, factors.rank, math.prod(outputs))
    return factors.scale * (a @ b)


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
