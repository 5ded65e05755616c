"""Factors that make up for a quantization: LoftQ and LQ-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.algebra.matrices import balanced, from_matrices, to_factors, to_matrices, truncated_svd, update
from jlora._src.types import Array, LoraFactors, Target

Quantizer = Callable[[Array], Any]


def dequantized(leaf: Any) -> Array:
    """The array that a quantized leaf stands for; an array is its own."""
    return leaf.dequantize() if hasattr(leaf, "dequantize") else leaf


def loftq(
    weight: Array, target: Target, dtype: str, *, quantizer: Quantizer, iterations: int = 5
) -> tuple[Any, LoraFactors]:
    """The last of the rounds that start from no factors (Li et al. 2023, algorithm 1)."""
    *_, last = _rounds(weight, target, dtype, quantizer, iterations, start=None)
    return last


def lq(
    weight: Array, target: Target, dtype: str, *, quantizer: Quantizer, iterations: int = 5
) -> tuple[Any, LoraFactors]:
    """The best of the rounds that start from the truncated SVD of the weight (Guo et al. 2023, section 3.1), and of one
    that starts from no factors."""
    (best,) = _rounds(weight, target, dtype, quantizer, 1, start=None)
    least = _error(weight, target, *best)
    for found in _rounds(weight, target, dtype, quantizer, iterations, start=_fitted(weight, target, dtype)):
        error = _error(weight, target, *found)
        best = jax.tree.map(lambda new, old, better=error < least: jnp.where(better, new, old), found, best)
        least = jnp.minimum(error, least)
    return best


def _rounds(
    weight: Array, target: Target, dtype: str, quantizer: Quantizer, iterations: int, *, start: LoraFactors | None
) -> Iterator[tuple[Any, LoraFactors]]:
    """The quantized weight and the factors after each round."""
    wide, factors = weight.astype(jnp.float32), start
    for _ in range(iterations):
        rest = quantizer(wide if factors is None else wide - _change(factors, target))
        if not hasattr(rest, "dequantize"):
            rest = jnp.asarray(rest).astype(weight.dtype)
        if (shape := tuple(dequantized(rest).shape)) != target.shape:
            raise ValueError(
                f"decompose: the quantizer returned shape {shape} for {target.path!r} of shape {target.shape}; "
                "expected the array as it is after quantization, or an object whose dequantize() returns that"
            )
        factors = _fitted(wide - dequantized(rest).astype(jnp.float32), target, dtype)
        yield rest, factors


def _fitted(matrix: Array, target: Target, dtype: str) -> LoraFactors:
    """The factors whose update is nearest to a matrix."""
    assert target.axes is not None
    u, s, vh = truncated_svd(to_matrices(matrix, target.axes), target.rank)
    return to_factors(*balanced(u, s, vh, target.scale), target, dtype)


def _change(factors: LoraFactors, target: Target) -> Array:
    assert target.axes is not None
    return from_matrices(update(factors), target.axes, target.shape)


def _error(weight: Array, target: Target, rest: Any, factors: LoraFactors) -> Array:
    total = dequantized(rest).astype(jnp.float32) + _change(factors, target)
    return jnp.linalg.norm((weight.astype(jnp.float32) - total).ravel())
