"""The low-rank share of a product: dropout on its input, its two contractions, and its sum with the frozen product."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored, fold_in
from jlora._src.engine.named_axes import NamedArray, accumulation_dtype, low_rank_dtype
from jlora._src.engine.product import Product, chain
from jlora._src.types import Array


def low_rank(scope: Any, eqn: Any, weight: Factored, x: NamedArray, y: NamedArray, summed: set[int]) -> Array:
    """The weight's low-rank part contracted with ``x`` over ``summed``, as an array like ``y``.

    The factor with most of the summed dimensions comes first: ``a`` in a straight use, ``b`` in a transposed one.
    Dimensions of both factors (a stack of matrices) are batch dimensions of the first product.
    """
    first, second = _in_order(weight, summed)
    early = {d for d in summed if d not in second.dims}  # summed by the first product
    hidden = (*(n for n in x.dims if n not in early), *(d for d in first.dims if d not in x.dims))
    out = tuple(n for n in y.dims if n in hidden or n in second.dims)
    x = adapter_input(scope, weight, x)
    x = x.sum([n for n in x.dims if n in early and n not in first.dims])  # the update is constant along these
    precision, (first_specs, last_specs) = eqn.params["precision"], _specs(x, first, second, y, hidden, out)
    products = (
        Product((x.dims, first.dims, hidden), precision, first_specs),
        Product((hidden, second.dims, out), precision, last_specs, last=True),
    )
    delta = chain(products, x.array, first.array, second.array)
    sizes = first.sizes | x.sizes
    per_hidden = math.prod(weight.shape[d] for d in early)
    per_output = weight.rank * math.prod(weight.shape[d] for d in summed if d in second.dims)
    flops = 2 * math.prod(sizes[n] for n in hidden) * per_hidden + 2 * delta.size * per_output
    scope.record_factored(weight, eqn, flops)
    return delta if out == y.dims else NamedArray(delta, out).broadcast(y.dims, y.array.shape)


def adapter_input(scope: Any, weight: Factored, x: NamedArray) -> NamedArray:
    """``x`` as input of the low-rank product: in a dtype that also fits the weight's, where the model mixes them
    (integers, one-hot booleans, float8), and with entries dropped at the weight's rate.

    Each batch slice of the weight has its own mask, as do each of its uses, each step of a surrounding loop, and,
    inside ``shard_map``, each device with its own ``x``.
    """
    x = x.apply(lambda array: array.astype(low_rank_dtype(array.dtype, weight.dtype)))
    if weight.key is None:
        return x
    shared = [d for d in weight.key.dims if d in x.dims]
    keys = weight.key.array
    for axis in reversed([i for i, d in enumerate(weight.key.dims) if d not in shared]):
        keys = lax.index_in_dim(keys, 0, axis, keepdims=False)
    keys = fold_in(keys, zlib.crc32(f"{weight.path}:{scope.session.next_mask(weight.path)}".encode()))
    for axis in sorted(compat.varying_axes(x.array)):
        keys = fold_in(keys, lax.axis_index(axis))
    return x.apply(lambda array: _dropped(array, _mask(keys, shared, x, 1 - weight.rate), weight.rate))


def total(y: NamedArray, delta: Array, multiplier: NamedArray | None) -> Array:
    """``(y + delta) * multiplier`` in the dtype of ``y``, rounded once."""
    dtype = accumulation_dtype(y.array.dtype)
    result = y.array.astype(dtype) + delta.astype(dtype)
    if multiplier is not None:
        result = result * multiplier.broadcast(y.dims, y.array.shape).astype(dtype)
    return result.astype(y.array.dtype)


def _in_order(weight: Factored, summed: set[int]) -> tuple[NamedArray, NamedArray]:
    """The factors in the order of their products with ``x``."""

    def share(factor: NamedArray, other: NamedArray) -> int:
        return math.prod(weight.shape[d] for d in summed if d in factor.dims and d not in other.dims)

    straight = share(weight.a, weight.b) >= share(weight.b, weight.a)
    return (weight.a, weight.b) if straight else (weight.b, weight.a)


def _specs(
    x: NamedArray, first: NamedArray, second: NamedArray, y: NamedArray, hidden: Sequence[Any], out: Sequence[Any]
) -> tuple[Any, Any]:
    """The specs of both products on a mesh with Explicit axes; None on any other."""
    if compat.explicit_spec(y.array) is None:
        return None, None
    known = first.spec | x.spec | y.spec
    hidden_spec = tuple(known.get(n) for n in hidden)
    first_specs = tuple(x.spec.values()), tuple(first.spec.values()), hidden_spec
    return first_specs, (hidden_spec, tuple(second.spec.values()), tuple(known[n] for n in out))


def _mask(keys: Array, shared: Sequence[Any], x: NamedArray, keep: float) -> Array:
    """Which entries of ``x`` to keep, each with probability ``keep``: drawn with one key per index of the ``shared``
    axes."""
    order = (*shared, *(n for n in x.dims if n not in shared))
    shape = tuple(x.sizes[n] for n in order)

    def draw(key: Array) -> Array:
        return jax.random.bernoulli(key, keep, shape[len(shared) :])

    for _ in shared:
        draw = jax.vmap(draw)
    mask = NamedArray(draw(keys), order).transpose(x.dims)
    return compat.reshard(mask, compat.explicit_spec(x.array) or ())


def _dropped(x: Array, kept: Array, rate: float) -> Array:
    scaled = x / (1 - rate)
    return jnp.where(kept, scaled, jnp.zeros_like(scaled)).astype(x.dtype)
