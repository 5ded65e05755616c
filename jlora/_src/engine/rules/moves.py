"""Rules for primitives that only move, cut or join a weight: the result is factored again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored
from jlora._src.engine.named_axes import RANK, Leg, joined
from jlora._src.engine.rules.arithmetic import added, carried, following, paths
from jlora._src.engine.rules.products import Decline


def transpose(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    return [weight.renamed(base, {old: new for new, old in enumerate(eqn.params["permutation"])})]


def squeeze(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    kept = [d for d in range(len(weight.shape)) if d not in eqn.params["dimensions"]]
    return [weight.renamed(base, {old: new for new, old in enumerate(kept)})]


def broadcast_in_dim(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """New dimensions, and spread ones of size 1, are dimensions along which every leg is constant."""
    weight, *dynamic = args
    (base,) = compat.bind(eqn, [weight.base, *dynamic])
    place = enumerate(eqn.params["broadcast_dimensions"])
    return [weight.renamed(base, {old: new for old, new in place if weight.shape[old] == base.shape[new]})]


def reshape(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Splits a dimension, or merges neighbours that a leg carries all or none of."""
    weight, *dynamic = args
    if dynamic or eqn.params["dimensions"] is not None:
        raise Decline("a reshape of dynamic size or permuted dimensions")
    (base,) = compat.bind(eqn, [weight.base])
    groups = reshape_groups(weight.shape, base.shape)
    if groups is None:
        raise Decline(f"reshape from {weight.shape} to {base.shape} mixes the axes")

    constant = [d for d in range(len(weight.shape)) if d not in weight.a.dims and d not in weight.b.dims]

    def reshaped(leg: Leg) -> Leg:
        leg = leg.renamed({d: d for d, size in enumerate(weight.shape) if size != 1})
        merged = [d for old, _ in groups if any(d in leg.dims for d in old) for d in old if d in constant]
        leg = following(leg, merged, weight.shape)
        carried = {old[0]: (old, new) for old, new in groups if any(d in leg.dims for d in old)}
        if any(d not in leg.dims for old, _ in carried.values() for d in old):
            raise Decline(f"reshape from {weight.shape} to {base.shape} merges axes of different roles")
        group_of = {d: old for old, _ in carried.values() for d in old} | {RANK: [RANK]}
        order = list(dict.fromkeys(d for axis in leg.dims for d in group_of[axis]))
        array = leg.ordered(order)
        sizes, dims = [], []
        for axis, size in zip(order, array.shape, strict=True):
            new = [axis] if axis == RANK else carried[axis][1] if axis in carried else []
            dims += new
            sizes += [size] if axis == RANK else [base.shape[d] for d in new]
        return Leg(array.reshape(sizes), tuple(dims))

    return [weight.with_legs(base, reshaped)]


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Which old dimensions become which new ones, as the finest groups; dimensions of size 1 are left out."""
    olds, news = ([d for d, size in enumerate(shape) if size != 1] for shape in (old, new))
    groups: list[tuple[list[int], list[int]]] = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (have := int(np.prod([old[d] for d in left]))) != (want := int(np.prod([new[d] for d in right]))):
            source, taken = (olds, left) if have < want else (news, right)
            if not source:
                return None
            taken.append(source.pop(0))
        groups.append((left, right))
    return None if olds or news else groups


def slices(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    p = eqn.params
    strides = p["strides"] or (1,) * len(weight.shape)

    def cut(leg: Leg) -> Leg:
        for d in range(len(weight.shape)):
            if base.shape[d] != weight.shape[d]:
                window = (p["start_indices"][d], p["limit_indices"][d], strides[d])
                leg = leg.along(d, lambda x, axis, w=window: lax.slice_in_dim(x, *w, axis=axis))
        return leg

    return [weight.with_legs(base, cut)]


def dynamic_slice(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``W[i]`` in a loop: every leg is sliced where it follows a sliced dimension."""
    weight, *starts = args
    sizes = eqn.params["slice_sizes"]
    if len(starts) != len(sizes) or isinstance(starts[0], Factored):
        raise Decline("a dynamic slice of dynamic size")
    (base,) = compat.bind(eqn, [weight.base, *starts])

    def cut(leg: Leg) -> Leg:
        for d, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            if size != weight.shape[d]:
                leg = leg.along(d, lambda x, axis, s=start, n=size: lax.dynamic_slice_in_dim(x, s, n, axis))
        return leg

    return [weight.with_legs(base, cut)]


def rev(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])

    def turn(leg: Leg) -> Leg:
        axes = [i for i, d in enumerate(leg.dims) if d in eqn.params["dimensions"]]
        return Leg(lax.rev(leg.array, axes), leg.dims) if axes else leg

    return [weight.with_legs(base, turn)]


def split(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    axis, sizes = eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]
    starts = np.cumsum([0, *sizes])

    def piece(i: int, base: Any) -> Factored:
        window = (int(starts[i]), int(starts[i + 1]))
        return weight.with_legs(base, lambda leg: leg.along(axis, lambda x, at: lax.slice_in_dim(x, *window, axis=at)))

    return [piece(i, base) for i, base in enumerate(compat.bind(eqn, [weight.base]))]


def unstack(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """The slices of a stack: ``for w in W``, from JAX 0.12 on."""
    (weight,) = args
    axis = eqn.params["axis"]
    place = {d: d - (d > axis) for d in range(len(weight.shape)) if d != axis}

    def piece(i: int, base: Any) -> Factored:
        one = weight.with_legs(
            weight.base, lambda leg: leg.along(axis, lambda x, at: lax.slice_in_dim(x, i, i + 1, axis=at))
        )
        return one.renamed(base, place)

    return [piece(i, base) for i, base in enumerate(compat.bind(eqn, [weight.base]))]


def pad(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Padding with any value pads the base with it and the update with zeros."""
    weight, value = args
    if isinstance(value, Factored):
        raise Decline("an adapted weight is the padding")
    (base,) = compat.bind(eqn, [weight.base, value])
    config = eqn.params["padding_config"]
    spread = [d for d, widths in enumerate(config) if any(widths)]
    for d in spread:
        _, weight = carried(weight, [d])
    gain, key = weight.gain, weight.key
    if key is not None and any(d in key.dims for d in spread):
        raise Decline("padding of a stack of weights with active dropout")
    zero = isinstance(eqn.invars[1], core.Literal) and eqn.invars[1].val == 0
    if gain is not None and not zero and not set(spread) <= set(gain.dims):
        raise Decline("padding of DoRA along another axis than its outputs, with a value that is not known to be zero")

    def padded(leg: Leg, value: float) -> Leg:
        widths = [config[d] if d in spread else (0, 0, 0) for d in leg.dims]
        return Leg(lax.pad(leg.array, jnp.full((), value, leg.array.dtype), widths), leg.dims)

    gain = None if gain is None else padded(gain, 1)
    return [dataclasses.replace(weight, base=base, a=padded(weight.a, 0), b=padded(weight.b, 0), gain=gain)]


def concatenate(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Joined along a batch axis, weights form a longer stack; side by side, their ranks add up."""
    axis = eqn.params["dimension"]
    (base,) = compat.bind(eqn, [v.base if isinstance(v, Factored) else v for v in args])
    weights = [v for v in args if isinstance(v, Factored)]
    if len(weights) == len(args) and all(axis in v.a.dims and axis in v.b.dims for v in weights):
        return [_longer(weights, axis, base)]
    starts = np.cumsum([0, *(v.shape[axis] for v in args)])
    blocks = [_block(v, axis, int(at), base) for v, at in zip(args, starts, strict=False) if isinstance(v, Factored)]
    joined = added([dataclasses.replace(v, gain=None) for v in blocks], base, plain=len(blocks) < len(args))
    return [dataclasses.replace(joined, gain=_joined_gain(args, axis))]


def _joined_gain(args: list[Any], axis: int) -> Leg | None:
    """DoRA's gain of weights joined along an output axis: their own gains, one after the other."""
    given = [v.gain for v in args if isinstance(v, Factored) and v.gain is not None]
    if not given:
        return None
    dims = given[0].dims
    if axis not in dims or any(gain.dims != dims for gain in given):
        raise Decline("DoRA on weights that are joined along another axis than their outputs")

    def own(v: Any) -> Any:
        gain = v.gain if isinstance(v, Factored) else None
        return jnp.ones([v.shape[d] for d in dims], given[0].array.dtype) if gain is None else gain.array

    return Leg(joined([own(v) for v in args], dims.index(axis)), dims)


def stack(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Weights stacked along a new axis, which is a batch axis."""
    axis = eqn.params["axis"]
    (base,) = compat.bind(eqn, [v.base if isinstance(v, Factored) else v for v in args])
    place = {d: d + (d >= axis) for d in range(base.ndim - 1)}

    def expanded(leg: Leg) -> Leg:
        leg = leg.renamed(place)
        return Leg(jnp.expand_dims(leg.array, 0), (axis, *leg.dims))

    parts = [v.with_legs(jnp.expand_dims(v.base, axis), expanded) if isinstance(v, Factored) else v for v in args]
    weights = [v for v in parts if isinstance(v, Factored)]
    if len(weights) == len(parts):
        return [_longer(weights, axis, base)]
    return [added([_block(v, axis, i, base) for i, v in enumerate(parts) if isinstance(v, Factored)], base, plain=True)]


def _longer(weights: list[Factored], axis: int, base: Any) -> Factored:
    """Weights that carry ``axis`` as a batch axis, joined along it; smaller ranks are padded with zeros."""
    rank = max(v.rank for v in weights)

    def longer(name: str) -> Leg | None:
        legs = [getattr(v, name) for v in weights]
        if all(leg is None for leg in legs):
            return None
        if any(leg is None or set(leg.dims) != set(legs[0].dims) for leg in legs):
            raise Decline("the weights are not adapted alike")
        arrays = [leg.along(RANK, lambda x, at: _grown(x, at, 0, rank)).ordered(legs[0].dims) for leg in legs]
        return Leg(joined(arrays, legs[0].dims.index(axis)), legs[0].dims)

    if len({v.rate for v in weights if v.key is not None}) > 1:
        raise Decline("the weights have different dropout rates")
    legs = {name: longer(name) for name in ("a", "b", "gain", "key")}
    return dataclasses.replace(weights[0], base=base, path=paths(weights), **legs)


def _block(weight: Factored, axis: int, start: int, base: Any) -> Factored:
    """The weight as a block of a larger one along ``axis``: its update is zero outside."""
    _, weight = carried(weight, [axis])

    def placed(leg: Leg) -> Leg:
        return leg.along(axis, lambda x, at: _grown(x, at, start, base.shape[axis]))

    return dataclasses.replace(weight, base=base, a=placed(weight.a), b=placed(weight.b))


def _grown(x: Any, axis: int, start: int, size: int) -> Any:
    """``x`` with zeros around it, so that it lies at ``start`` on an axis of ``size``."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (start, size - start - x.shape[axis], 0)
    return x if x.shape[axis] == size else lax.pad(x, jnp.zeros((), x.dtype), config)


def convert_element_type(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A cast of the base. The factors stay as they are: products cast them to the activation's dtype."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Decline(f"a cast to {eqn.params['new_dtype']}")
    return keep(scope, eqn, args)


def keep(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A primitive that changes no value: it is applied to the base alone."""
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    return [dataclasses.replace(weight, base=base)]


def stop_gradient(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    return [weight.with_legs(base, lambda leg: Leg(lax.stop_gradient(leg.array), leg.dims))]


def optimization_barrier(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(args)))
