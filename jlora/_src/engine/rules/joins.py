"""Joins of several weights, or of weights and arrays: sums, concatenations and stacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import RANK, NamedArray, concatenate, promote_arrays
from jlora._src.engine.rules.rule import Decline, bind_base
from jlora._src.engine.traced_weights import NO_AXES, Value, is_data, mark_materialized, move_dims, union, weights_in

JOINED = "DoRA, a trained multiplier or active dropout on weights that are joined"
ADAPTED_DIFFERENTLY = "the weights are adapted along different axes"


def add_weights(weights: list[Factored], base: Any, *, with_array: bool) -> Factored:
    """The sum of the weights' updates on ``base``: the factors are concatenated along the rank.

    The sum keeps a shared multiplier if ``base`` is the sum of their bases alone, not ``with_array``.
    """
    first = max(weights, key=lambda v: len(v.a.dims) + len(v.b.dims))  # the others may be constant along some axes
    if len(weights) == 1 and first.multiplier is None and first.key is None:
        return dataclasses.replace(first, base=base)
    alone = len(weights) == 1
    if any(alone or not _share(weights, n) for n in ("multiplier", "key") if any(getattr(v, n) for v in weights)):
        raise Decline(JOINED)
    if with_array and first.multiplier is not None:
        raise Decline(JOINED)

    def arrays(name: str) -> list[Any]:
        dims = getattr(first, name).dims
        factors = [getattr(v, name).expand(dims, base.shape) for v in weights]
        if any(set(factor.dims) != set(dims) for factor in factors):
            raise Decline(ADAPTED_DIFFERENTLY)
        return [factor.transpose(dims) for factor in factors]

    other = {"a": "b", "b": "a"}
    shared = next((name for name in other if _share(weights, name)), None)
    if shared is None:
        both = {name: getattr(first, name).dims for name in other}
        factors = {n: NamedArray(concatenate(arrays(n), dims.index(RANK)), dims) for n, dims in both.items()}
    else:  # parts of one weight, such as w - mean(w): the other factors add up, and the rank stays the same
        name = other[shared]
        factors = {name: NamedArray(sum(promote_arrays(*arrays(name))), getattr(first, name).dims)}
    return dataclasses.replace(first, base=base, path=_paths(weights), **factors)


def label_sum(value: Value, with_array: bool) -> Value:
    """Added weights: those with trained multipliers are materialized, except in a weight minus its own mean."""
    multipliers = {(w.path, w.multiplier_axes) for w in weights_in(value)}
    fits = all(axes is None for _, axes in multipliers) or (len(multipliers) == 1 and not with_array)
    return value if fits else mark_materialized(value, JOINED)


def concatenate_weights(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Concatenated along a batch axis, weights form a longer stack; along another one, their ranks add up."""
    axis = eqn.params["dimension"]
    (base,) = bind_base(eqn, args)
    weights = [v for v in args if isinstance(v, Factored)]
    if len(weights) == len(args) and all(axis in v.a.dims and axis in v.b.dims for v in weights):
        return [_longer_stack(weights, axis, base)]
    starts = np.cumsum([0, *(v.shape[axis] for v in args)])
    blocks = [_as_block(v, axis, int(at), base) for v, at in zip(args, starts, strict=False) if isinstance(v, Factored)]
    blocks = [dataclasses.replace(v, multiplier=None) for v in blocks]
    joined = add_weights(blocks, base, with_array=len(blocks) < len(args))
    nonzero = all(v.nonzero or v.multiplier is None for v in weights)
    return [dataclasses.replace(joined, multiplier=_concatenated_multiplier(args, axis), nonzero=nonzero)]


def label_concatenate(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    if any(map(is_data, values)):
        return walker.consume(eqn, values)
    joined, axis = union(values), eqn.params["dimension"]
    multiplied = [w for w in weights_in(joined) if w.multiplier_axes is not None]
    fits = len({w.multiplier_axes for w in multiplied}) <= 1
    fits = fits and all(w.dims[axis] and w.dims[axis] <= (w.multiplier_axes or NO_AXES) for w in multiplied)
    return [joined if fits else mark_materialized(joined, JOINED)]


def stack(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Weights stacked along a new axis, a batch axis."""
    axis = eqn.params["axis"]
    (base,) = bind_base(eqn, args)
    place = {d: d + (d >= axis) for d in range(base.ndim - 1)}

    def expanded(part: NamedArray) -> NamedArray:
        part = part.rename(place)
        return NamedArray(jnp.expand_dims(part.array, 0), (axis, *part.dims))

    args = [v.map_parts(jnp.expand_dims(v.base, axis), expanded) if isinstance(v, Factored) else v for v in args]
    weights = [v for v in args if isinstance(v, Factored)]
    if len(weights) == len(args):
        return [_longer_stack(weights, axis, base)]
    blocks = [_as_block(v, axis, i, base) for i, v in enumerate(args) if isinstance(v, Factored)]
    return [add_weights(blocks, base, with_array=True)]


def label_stack(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    if any(map(is_data, values)):
        return walker.consume(eqn, values)
    return [move_dims(union(values), lambda dims: [*dims[:at], NO_AXES, *dims[at:]])]


def _concatenated_multiplier(args: list[Any], axis: int) -> NamedArray | None:
    """The multipliers of weights that are concatenated along an output axis, concatenated; 1 for a plain array."""
    given = [v.multiplier for v in args if isinstance(v, Factored) and v.multiplier is not None]
    if not given:
        return None
    dims = given[0].dims
    if axis not in dims or any(multiplier.dims != dims for multiplier in given):
        raise Decline("DoRA on weights that are joined along another axis than their outputs")

    def own(v: Any) -> Any:
        if isinstance(v, Factored) and v.multiplier is not None:
            return v.multiplier.array
        return jnp.ones([v.shape[d] for d in dims], given[0].array.dtype)

    return NamedArray(concatenate([own(v) for v in args], dims.index(axis)), dims)


def _longer_stack(weights: list[Factored], axis: int, base: Any) -> Factored:
    """Weights with ``axis`` as a batch axis, concatenated along it; smaller ranks are padded with zeros."""
    rank = max(v.rank for v in weights)

    def join(name: str) -> NamedArray | None:
        parts = [getattr(v, name) for v in weights]
        if all(part is None for part in parts):
            return None
        if any(part is None or set(part.dims) != set(parts[0].dims) for part in parts):
            raise Decline(ADAPTED_DIFFERENTLY)
        dims = parts[0].dims
        arrays = [part.apply_along(RANK, lambda x, at: _pad_zeros(x, at, 0, rank)).transpose(dims) for part in parts]
        return NamedArray(concatenate(arrays, dims.index(axis)), dims)

    if len({v.rate for v in weights if v.key is not None}) > 1:
        raise Decline("the weights have different dropout rates")
    joined = {name: join(name) for name in ("a", "b", "multiplier", "key")}
    nonzero = all(v.nonzero for v in weights)
    return dataclasses.replace(weights[0], base=base, path=_paths(weights), nonzero=nonzero, **joined)


def _as_block(weight: Factored, axis: int, start: int, base: Any) -> Factored:
    """The weight as a block of a larger one along ``axis``, with a zero update outside."""
    _, weight = weight.factor_along([axis])

    def padded(factor: NamedArray) -> NamedArray:
        return factor.apply_along(axis, lambda x, at: _pad_zeros(x, at, start, base.shape[axis]))

    return dataclasses.replace(weight, base=base, a=padded(weight.a), b=padded(weight.b))


def _pad_zeros(x: Any, axis: int, start: int, size: int) -> Any:
    """``x`` with zeros around it, so that it begins at ``start`` on an axis of ``size``."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (start, size - start - x.shape[axis], 0)
    return x if x.shape[axis] == size else lax.pad(x, jnp.zeros((), x.dtype), config)


def _share(weights: list[Factored], name: str) -> bool:
    """Whether several weights share one array as this part, or all have none."""
    first, *rest = (getattr(v, name) for v in weights)
    if first is None:
        return all(part is None for part in rest)
    return all(part is not None and part.array is first.array and part.dims == first.dims for part in rest)


def _paths(weights: list[Factored]) -> str:
    return ", ".join(dict.fromkeys(v.path for v in weights))
