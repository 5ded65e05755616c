"""Norms, distance and angle of adapters' updates, from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.algebra.matrices import factor_matrices, joined
from jlora._src.algebra.parts import Parts, check_alike, parts
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree


def norms(adapters: Adapters, *, params: PyTree | None = None) -> dict[Path, Array]:
    """``{path: Frobenius norm of the update}``, scalars, float32 or wider; for a stacked weight, over all its slices.

    Computed from the triangular parts of the factors, so no array has the size of a weight.

    >>> norms = jax.device_get(jlora.norms(adapters))
    >>> sorted(norms, key=norms.get)[-5:]  # the weights that changed most

    Args:
      adapters: plain LoRA.
      params: the base, needed for leaves trained whole, whose update is their difference to it.

    Raises:
      ValueError: listing every path with DoRA, and every leaf trained whole if there are no params.
      TypeError, KeyError: as `merge`.
    """
    found = parts(adapters, params, "norms")
    with jax.default_matmul_precision("highest"):
        return {path: _norm([found], [1.0], path) for path in adapters}


def distance(one: Adapters, other: Adapters, *, params: PyTree | None = None) -> Array:
    """The Frobenius norm of the difference of two adapters' updates, over all weights: a scalar, float32 or wider.

    Accurate to rounding of the larger update, however close the two are. A path that one lacks counts as no update.

    >>> jlora.distance(adapters, jlora.truncate(adapters, rank=2))

    Args:
      one, other: plain LoRA of one base; ranks, scales and dtypes may differ.
      params: the base, needed for leaves trained whole, whose update is their difference to it.

    Raises:
      ValueError: listing every path with DoRA, or that differs in kind, axes or shape; and every leaf trained whole if
        there are no params.
      TypeError, KeyError: as `merge`.
    """
    both = _both(one, other, params, "distance")
    with jax.default_matmul_precision("highest"):
        return _total([_norm(both, [1.0, -1.0], path) for path in {**one, **other}])


def cosine(one: Adapters, other: Adapters, *, params: PyTree | None = None) -> Array:
    """The cosine of the angle between two adapters' updates as vectors of all entries: a scalar, float32 or wider.

    The inner product is that of Gram matrices, ``sum((A₁ᵀA₂) ∘ (B₁B₂ᵀ))``, so no array has the size of a weight. 0 if
    an update is zero. A path that one lacks counts as no update.

    Args, raises: as `distance`.
    """
    both = _both(one, other, params, "cosine")
    with jax.default_matmul_precision("highest"):
        product = jnp.asarray(sum(_inner(both[0], both[1], path) for path in one if path in other))
        size, other_size = (_total([_norm([own], [1.0], path) for path in (*own.factors, *own.whole)]) for own in both)
    size = size * other_size
    return jnp.where(size > 0, product / jnp.where(size > 0, size, 1), 0)


def _both(one: Adapters, other: Adapters, params: PyTree | None, what: str) -> list[Parts]:
    found = [parts(one, params, f"{what}, the first"), parts(other, params, f"{what}, the second")]
    check_alike((one, other), what)
    return found


def _norm(trees: list[Parts], signs: list[float], path: Path) -> Array:
    """The norm of a weight's update, or of the difference of two."""
    whole = [sign * tree.whole[path] for tree, sign in zip(trees, signs, strict=True) if path in tree.whole]
    if whole:
        return jnp.linalg.norm(jnp.ravel(sum(whole)))
    return _norm_of_sum([(tree.factors[path], w) for tree, w in zip(trees, signs, strict=True) if path in tree.factors])


@jax.jit
def _norm_of_sum(pairs: Sequence[tuple[LoraFactors, Any]]) -> Array:
    a, b = joined(pairs)
    left, right = jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.mT, mode="r")
    return jnp.linalg.norm(jnp.ravel(left @ right.mT))


def _inner(one: Parts, other: Parts, path: Path) -> Array:
    if path in one.whole:
        return jnp.vdot(one.whole[path], other.whole[path])
    return _inner_product(one.factors[path], other.factors[path])


@jax.jit
def _inner_product(f: LoraFactors, g: LoraFactors) -> Array:
    (a, b), (c, d) = factor_matrices(f), factor_matrices(g)
    with jax.numpy_dtype_promotion("standard"):
        return f.scale * g.scale * jnp.sum((a.mT @ c) * (b @ d.mT))


def _total(sizes: list[Array]) -> Array:
    return jnp.sqrt(jnp.asarray(sum(jnp.square(size) for size in sizes)))
