"""The random factors of fresh adapters: their product is zero, so the model does not change yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jlora._src.types import Array, Target

_Draw = Callable[[Array, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, str], tuple[Array, Array]]


def fresh_factors(key: Array, target: Target, dtype: str) -> tuple[Array, Array]:
    """``(a, b)`` of one weight, of shapes ``batch + inputs + (rank,)`` and ``batch + (rank,) + outputs``.

    A lookup table has a = 0 and b from N(0, 1), whatever its ``init``, as in PEFT.
    """
    assert target.axes is not None
    batch, inputs, outputs = target.axes.sizes(target.shape)
    if target.lookup:
        b = jax.random.normal(key, (*batch, target.rank, *outputs), dtype)
        return jnp.zeros((*batch, *inputs, target.rank), dtype), b
    return _DRAWS[target.init](key, batch, inputs, outputs, target.rank, dtype)


def _kaiming(
    key: Array, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, dtype: str
) -> tuple[Array, Array]:
    """a from U(±1/sqrt(fan_in)), like torch's ``kaiming_uniform_(a=sqrt(5))``; b = 0."""
    bound = 1 / math.sqrt(max(math.prod(inputs), 1))
    a = jax.random.uniform(key, (*batch, *inputs, rank), dtype, -bound, bound)
    return a, jnp.zeros((*batch, rank, *outputs), dtype)


def _gaussian(
    key: Array, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, dtype: str
) -> tuple[Array, Array]:
    """a from N(0, 1/rank²); b = 0."""
    a = jax.random.normal(key, (*batch, *inputs, rank), dtype) / rank
    return a, jnp.zeros((*batch, rank, *outputs), dtype)


def _orthogonal(
    key: Array, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, dtype: str
) -> tuple[Array, Array]:
    """Both normal, over orthogonal halves of a random basis of the rank: ``a·b`` is zero up to rounding."""
    of_basis, of_a, of_b = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(of_basis, (*batch, rank, rank)))[0]
    half = rank // 2
    left = jax.random.normal(of_a, (*batch, math.prod(inputs), half))
    right = jax.random.normal(of_b, (*batch, half, math.prod(outputs)))
    with jax.default_matmul_precision("highest"):
        a = left @ basis[..., 0::2, :] / 10
        b = basis[..., 1::2, :].mT @ right / 10
    return a.reshape(*batch, *inputs, rank).astype(dtype), b.reshape(*batch, rank, *outputs).astype(dtype)


_DRAWS: Mapping[str, _Draw] = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal}
