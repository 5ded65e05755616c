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
from jlora._src.engine.factors.adapted_product import AdaptedProduct, Dot, adapted_product
from jlora._src.engine.factors.factored import Factored, fold_in
from jlora._src.engine.factors.named_axes import NamedArray, accumulation_dtype, low_rank_dtype
from jlora._src.engine.factors.product import Product, chain
from jlora._src.engine.factors.stored import with_base
from jlora._src.engine.observation import observe, observed_input
from jlora._src.types import Array


def adapted(
    scope: Any,
    eqn: Any,
    weight: Factored,
    x: NamedArray,
    dot: Dot,
    out: Sequence[Any],
    summed: set[int],
    multiplier: NamedArray | None,
) -> Array:
    """The product of ``x`` with a weight over ``summed``, as an array with the axes ``out``.

    The factor with most of the summed dimensions comes first: ``a`` in a straight use, ``b`` in a transposed one.
    Dimensions of both factors (a stack of matrices) are batch dimensions of the first product.
    """
    dtype = eqn.outvars[0].aval.dtype

    def of_base(base: Array, x: Array) -> Array:
        return dot(x, base)

    if weight.is_frozen:
        y = with_base(weight.base, of_base, x.array)
        return y if multiplier is None else scaled(NamedArray(y, tuple(out)), multiplier, dtype)
    first, second = _in_order(weight, summed)
    early = {d for d in summed if d not in second.dims}  # summed by the first product
    hidden = (*(n for n in x.dims if n not in early), *(d for d in first.dims if d not in x.dims))
    names = tuple(n for n in out if n in hidden or n in second.dims)  # along the others, the update is constant
    sizes = first.sizes | x.sizes | second.sizes
    per_hidden = math.prod(weight.shape[d] for d in early)
    per_output = weight.rank * math.prod(weight.shape[d] for d in summed if d in second.dims)
    flops = [math.prod(sizes[n] for n in dims) * per for dims, per in ((hidden, per_hidden), (names, per_output))]
    scope.record_factored(weight, eqn, 2 * sum(flops))
    constant = {n for n in x.dims if n in early and n not in first.dims}
    same = x.array.dtype == weight.dtype == low_rank_dtype(x.array.dtype)
    observation = scope.session.observation
    if same and weight.key is None and not constant and compat.explicit_spec(x.array) is None and observation is None:
        weight_dims = tuple(range(len(weight.shape)))
        axes = AdaptedProduct(
            (x.dims, weight_dims, hidden, first.dims, second.dims, tuple(out)), dot, eqn.params["precision"]
        )
        wide = dtype if multiplier is None else accumulation_dtype(dtype)

        def product(base: Array, x: Array, a: Array, b: Array) -> Array:
            return adapted_product(x, base, a, b, axes, wide)

        y = with_base(weight.base, product, x.array, first.array, second.array)
        return scaled(NamedArray(y, tuple(out)), multiplier, dtype, nonzero=weight.nonzero)
    y = NamedArray(with_base(weight.base, of_base, x.array), tuple(out))
    x = adapter_input(scope, weight, x).sum(constant)
    precision, (first_specs, last_specs) = eqn.params["precision"], _specs(x, first, second, y, hidden, names)
    products = (
        Product((x.dims, first.dims, hidden), precision, first_specs),
        Product((hidden, second.dims, names), precision, last_specs, last=True),
    )
    if observation is not None:
        y = scaled(y, multiplier, dtype)
        seen = first is weight.a  # a transposed use has the outputs as its inputs
        return observe(y, chain(products[:1], x.array, first.array), observation) if seen else y
    delta = chain(products, x.array, first.array, second.array)
    return total(y, NamedArray(delta, names).broadcast(y.dims, y.array.shape), multiplier, nonzero=weight.nonzero)


def adapter_input(scope: Any, weight: Factored, x: NamedArray) -> NamedArray:
    """``x`` as input of the low-rank product: in a dtype that also fits the weight's, where the model mixes them
    (integers, one-hot booleans, float8), and with entries dropped at the weight's rate.

    Each batch slice of the weight has its own mask, as do each of its uses, each step of a surrounding loop, and,
    inside ``shard_map``, each device with its own ``x``.
    """
    if (observation := scope.session.observation) is not None:
        return x.apply(lambda array: observed_input(array, observation))
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


def total(y: NamedArray, delta: Array, multiplier: NamedArray | None, *, nonzero: bool = False) -> Array:
    """``(y + delta) * multiplier`` in the dtype of ``y``, rounded once."""
    dtype = accumulation_dtype(y.array.dtype)
    result = NamedArray(y.array.astype(dtype) + delta.astype(dtype), y.dims)
    return scaled(result, multiplier, y.array.dtype, nonzero=nonzero)


def scaled(y: NamedArray, multiplier: NamedArray | None, dtype: Any, *, nonzero: bool = False) -> Array:
    """``y * multiplier`` in ``dtype``, rounded once. See `Factored.nonzero`."""
    if multiplier is None:
        return y.array.astype(dtype)
    shape = [size if name in multiplier.dims else 1 for name, size in zip(y.dims, y.array.shape, strict=True)]
    array, factor = y.array, multiplier.broadcast(y.dims, shape).astype(y.array.dtype)
    array, factor = compat.match_varying(array, factor)
    return _scaled_by_nonzero(array, factor, dtype) if nonzero else _scaled(array, factor, dtype)


def _scaled(y: Array, factor: Array, dtype: Any) -> Array:
    return (y * factor).astype(dtype)


_scaled_by_nonzero = jax.custom_jvp(_scaled, nondiff_argnums=(2,))


@_scaled_by_nonzero.defjvp
def _scaled_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Takes ``y`` for the factor's derivative from the result: it is the model's own activation, in its own dtype, and
    what follows often keeps it. ``y`` would be one more activation for each weight, in float32."""
    (y, factor), (dy, d_factor) = primals, tangents
    result = _scaled_by_nonzero(y, factor, dtype)
    change = d_factor / jnp.where(factor == 0, jnp.ones_like(factor), factor)
    return result, (dy * factor + result.astype(y.dtype) * change).astype(dtype)


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
