"""Adapters times a number, and adapters of a lower rank."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.algebra.matrices import balanced, factor_matrices, product_svd, with_matrices
from jlora._src.algebra.parts import check_no_dora, check_ranks, parts
from jlora._src.algebra.ranks import check_options, rank_for
from jlora._src.engine import compat
from jlora._src.engine.factors.named_axes import accumulation_dtype
from jlora._src.paths import named_leaves
from jlora._src.quantized import as_array
from jlora._src.tree.checks import check_finite, check_kinds
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree


def negate(adapters: Adapters, *, params: PyTree | None = None) -> dict[Path, LoraFactors | Array]:
    """The adapters that take away what ``adapters`` add: B with the opposite sign, exact in every dtype.

    >>> jlora.merge(jlora.merge(params, adapters), jlora.negate(adapters))  # the base again, up to rounding

    Args:
      adapters: plain LoRA.
      params: the base, needed for leaves trained whole: these become ``2·base - leaf``, float32 or wider.

    Raises:
      ValueError: listing every path with DoRA, and every leaf trained whole if there are no params.
      TypeError, KeyError: as `merge`.
    """
    found = parts(adapters, params, "negate")
    flipped = {path: dataclasses.replace(f, b=-f.b) for path, f in found.factors.items()}
    whole = on_base(params, {path: -x for path, x in found.whole.items()})
    return {path: flipped[path] if path in flipped else whole[path] for path in adapters}


def rescale(
    adapters: Adapters, factor: float | Array, *, params: PyTree | None = None
) -> dict[Path, LoraFactors | Array]:
    """The adapters with their updates times ``factor``, which is multiplied into B, float32 or wider.

    `attach` has ``strength`` for the same at run time. The static scale is unchanged.

    >>> jlora.peft.save(folder, names, params, jlora.rescale(adapters, 0.7), config)

    Args:
      adapters: plain LoRA.
      factor: a number or a scalar array, of any sign; may be traced.
      params: the base, needed for leaves trained whole: these become ``base + factor · (leaf - base)``.

    Raises:
      ValueError: listing every path with DoRA, and every leaf trained whole if there are no params.
      TypeError, KeyError: as `merge`.
    """
    found = parts(adapters, params, "rescale")

    def scaled(x: Array) -> Array:
        x = compat.to_device(x).astype(accumulation_dtype(x.dtype))
        return x * jnp.asarray(factor, x.dtype)

    factors = {path: dataclasses.replace(f, b=scaled(f.b)) for path, f in found.factors.items()}
    whole = on_base(params, {path: scaled(x) for path, x in found.whole.items()})
    return {path: factors[path] if path in factors else whole[path] for path in adapters}


def on_base(params: PyTree | None, changes: dict[Path, Array]) -> dict[Path, Array]:
    """Leaves trained whole from their differences to the base, in the dtypes of these."""
    leaves = named_leaves(params)[0] if changes else {}
    bases = {path: compat.to_device(jnp.asarray(as_array(leaves[path]))) for path in changes}
    return {path: bases[path].astype(x.dtype) + x for path, x in changes.items()}


def truncate(
    adapters: Adapters, *, rank: int | None = None, energy: float | None = None
) -> dict[Path, LoraFactors | Array]:
    """The nearest adapters of a lower rank, by the Frobenius norm of each weight's update (Eckart and Young 1936).

    The singular values are those of the product of the factors' triangular parts, so no array has the size of a weight:
    ``O((inputs + outputs)·rank²)`` for each. They are shared evenly between A and B.

    >>> small = jlora.truncate(adapters, energy=0.99)  # each weight gets the rank it needs

    Args:
      adapters: plain LoRA, and leaves trained whole, which are returned as they are.
      rank: at most this; an update of a lower rank keeps its own.
      energy: in place of a rank: the share of the sum of squared singular values to keep; each weight gets the smallest
        rank for it, one for all slices of a stacked weight. Not under ``jit``, where ranks cannot depend on values.

    Returns:
      As ``adapters``, with the same scales; new factors are float32 or wider.

    Raises:
      ValueError: listing every path with DoRA, and every one with NaN or infinity (not under ``jit``); for a rank or
        energy out of range.
      TypeError: unless one of rank and energy is given; for energy under ``jit``; as `merge`.
    """
    check_options("truncate", rank, energy)
    check_kinds(adapters, "truncate")
    check_no_dora(adapters, "truncate")
    check_ranks(adapters, "truncate")
    check_finite(adapters, "truncate")

    def one(value: Any) -> Any:
        return _truncated(value, rank, energy) if isinstance(value, LoraFactors) else value

    with jax.default_matmul_precision("highest"):
        return {path: one(value) for path, value in adapters.items()}


def _truncated(f: LoraFactors, rank: int | None, energy: float | None) -> LoraFactors:
    u, s, vh = _svd(f)
    return _cut(f, u, s, vh, rank_for(s, energy, "truncate") if energy is not None else rank)


@jax.jit
def _svd(f: LoraFactors) -> tuple[Array, Array, Array]:
    return product_svd(*factor_matrices(f))


@functools.partial(jax.jit, static_argnames="rank")
def _cut(f: LoraFactors, u: Array, s: Array, vh: Array, rank: int | None) -> LoraFactors:
    return with_matrices(f, *balanced(u[..., :rank], s[..., :rank], vh[..., :rank, :], 1.0), f.scale)
