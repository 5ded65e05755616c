"""Primitives that only move, cut or pad a weight: the result is factored again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import RANK, NamedArray
from jlora._src.engine.rules.rule import Decline, bind_base
from jlora._src.engine.traced_weights import NO_AXES, Value, broadcast, move_dims, require, weights_in

# Dimensions that move


def transpose(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)
    return [weight.rename_dims(base, {old: new for new, old in enumerate(eqn.params["permutation"])})]


def label_transpose(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return [move_dims(values[0], lambda dims: [dims[d] for d in eqn.params["permutation"]])]


def squeeze(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)
    kept = [d for d in range(len(weight.shape)) if d not in eqn.params["dimensions"]]
    return [weight.rename_dims(base, {old: new for new, old in enumerate(kept)})]


def label_squeeze(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    return [move_dims(values[0], lambda dims: [axes for d, axes in enumerate(dims) if d not in gone])]


def broadcast_in_dim(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Every part is constant along new dimensions and those broadcast from size 1."""
    weight, *_ = args
    (base,) = bind_base(eqn, args)
    place = enumerate(eqn.params["broadcast_dimensions"])
    return [weight.rename_dims(base, {old: new for old, new in place if weight.shape[old] == base.shape[new]})]


def label_broadcast_in_dim(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [broadcast(values[0], before, after, eqn.params["broadcast_dimensions"])]


def reshape(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Splits a dimension, or merges neighbours; each part must have all of a merged group or none."""
    weight, *dynamic = args
    if dynamic or eqn.params["dimensions"] is not None:
        raise Decline("a reshape of dynamic size or permuted dimensions")
    (base,) = bind_base(eqn, args)
    groups = _reshape_groups(weight.shape, base.shape)
    if groups is None:
        raise Decline(f"reshape from {weight.shape} to {base.shape} mixes the axes")

    constant = [d for d in range(len(weight.shape)) if d not in weight.a.dims and d not in weight.b.dims]

    def reshaped(part: NamedArray) -> NamedArray:
        part = part.rename({d: d for d, size in enumerate(weight.shape) if size != 1})
        own = [(old, new) for old, new in groups if any(d in part.dims for d in old)]
        part = part.expand([d for old, _ in own for d in old if d in constant], weight.shape)
        if any(d not in part.dims for old, _ in own for d in old):
            raise Decline(_merges(weight.shape, base.shape))
        # The part's groups of dimensions, in order of first occurrence.
        group_of = {d: group for group in (*own, ([RANK], [RANK])) for d in group[0]}
        order = list({group_of[d][0][0]: group_of[d] for d in part.dims}.values())
        array, dims = part.transpose([d for old, _ in order for d in old]), [d for _, new in order for d in new]
        return NamedArray(array.reshape([weight.rank if d == RANK else base.shape[d] for d in dims]), tuple(dims))

    return [weight.map_parts(base, reshaped)]


def label_reshape(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    groups = _reshape_groups(before, after)
    if groups is None:
        return walker.consume(eqn, values)

    def move(dims: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        held = {d: NO_AXES.union(*(dims[o] for o in olds)) for olds, news in groups for d in news}
        return [held.get(d, NO_AXES) for d in range(len(after))]

    merged = [olds for olds, _ in groups if len(olds) > 1]
    return [move_dims(require(values[0], merged, same_role=True, why=_merges(before, after)), move)]


def _merges(before: Sequence[int], after: Sequence[int]) -> str:
    return f"reshape from {before} to {after} merges axes of different roles"


def _reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Old dimensions matched with new ones, in the finest groups; dimensions of size 1 are left out."""
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


# Cuts and padding


def slices(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)
    p = eqn.params
    strides = p["strides"] or (1,) * len(weight.shape)

    def cut(part: NamedArray) -> NamedArray:
        for d in range(len(weight.shape)):
            if base.shape[d] != weight.shape[d]:
                window = (p["start_indices"][d], p["limit_indices"][d], strides[d])
                part = part.apply_along(d, lambda x, axis, w=window: lax.slice_in_dim(x, *w, axis=axis))
        return part

    return [weight.map_parts(base, cut)]


def dynamic_slice(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``W[i]`` in a loop: every part is sliced along its own dimensions."""
    weight, *starts = args
    sizes = eqn.params["slice_sizes"]
    if len(starts) != len(sizes) or isinstance(starts[0], Factored):
        raise Decline("a dynamic slice of dynamic size")
    (base,) = bind_base(eqn, args)

    def cut(part: NamedArray) -> NamedArray:
        for d, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            if size != weight.shape[d]:
                part = part.apply_along(d, lambda x, axis, s=start, n=size: lax.dynamic_slice_in_dim(x, s, n, axis))
        return part

    return [weight.map_parts(base, cut)]


def rev(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)

    def reverse(part: NamedArray) -> NamedArray:
        axes = [i for i, d in enumerate(part.dims) if d in eqn.params["dimensions"]]
        return part.apply(lambda x: lax.rev(x, axes)) if axes else part

    return [weight.map_parts(base, reverse)]


def split(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    axis, starts = eqn.params["axis"], np.cumsum([0, *map(int, eqn.params["sizes"])]).tolist()
    return [
        _slice_along(weight, base, axis, start, stop)
        for base, start, stop in zip(bind_base(eqn, args), starts, starts[1:], strict=False)
    ]


def unstack(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """The slices of a stack: ``for w in W``, from JAX 0.12 on."""
    (weight,) = args
    axis = eqn.params["axis"]
    place = {d: d - (d > axis) for d in range(len(weight.shape)) if d != axis}
    bases = bind_base(eqn, args)
    return [_slice_along(weight, base, axis, i, i + 1).rename_dims(base, place) for i, base in enumerate(bases)]


def label_unstack(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    return [move_dims(values[0], lambda dims: [*dims[:at], *dims[at + 1 :]])] * len(eqn.outvars)


def _slice_along(weight: Factored, base: Any, axis: int, start: int, stop: int) -> Factored:
    """The weight with another base, its parts sliced along one dimension."""
    return weight.map_parts(
        base, lambda part: part.apply_along(axis, lambda x, at: lax.slice_in_dim(x, start, stop, axis=at))
    )


def pad(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Pads the base with the given value and the update with zeros."""
    weight, value = args
    if isinstance(value, Factored):
        raise Decline("the padding value is an adapted weight")
    (base,) = bind_base(eqn, args)
    config = eqn.params["padding_config"]
    padded = [d for d, widths in enumerate(config) if any(widths)]
    for d in padded:
        _, weight = weight.factor_along([d])
    multiplier, key = weight.multiplier, weight.key
    if key is not None and any(d in key.dims for d in padded):
        raise Decline("padding of a stack of weights with active dropout")
    zero = isinstance(eqn.invars[1], core.Literal) and eqn.invars[1].val == 0
    if multiplier is not None and not zero and not set(padded) <= set(multiplier.dims):
        raise Decline("padding of DoRA along another axis than its outputs, with a value that is not known to be zero")

    def pad_part(part: NamedArray, value: float) -> NamedArray:
        widths = [config[d] if d in padded else (0, 0, 0) for d in part.dims]
        return part.apply(lambda x: lax.pad(x, jnp.full((), value, x.dtype), widths))

    multiplier = None if multiplier is None else pad_part(multiplier, 1)
    return [
        dataclasses.replace(weight, base=base, a=pad_part(weight.a, 0), b=pad_part(weight.b, 0), multiplier=multiplier)
    ]


# The same entries


def keep(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A primitive that changes no values: applied to the base alone."""
    (weight,) = args
    (base,) = bind_base(eqn, args)
    return [dataclasses.replace(weight, base=base)]


def convert_element_type(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A cast of the base. The factors stay as they are: products cast them to the activation's dtype."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Decline(f"a cast to {eqn.params['new_dtype']}")
    return keep(scope, eqn, args)


def label_convert_element_type(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A cast to another floating dtype; an integer weight is followed through its dequantization."""
    (value,), dtype = values, eqn.params["new_dtype"]
    if any(weight.adaptable for weight in weights_in(value)) and not jnp.issubdtype(dtype, jnp.floating):
        return walker.consume(eqn, values, lambda *_: f"a cast to {dtype}")
    return values


def stop_gradient(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)
    return [weight.map_parts(base, lambda part: part.apply(lax.stop_gradient))]


def label_stop_gradient(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    walker.consume(eqn, values, lambda *_: "its gradient is stopped")
    return [tuple(dataclasses.replace(weight, stopped=True) for weight in weights_in(values[0]))]


def optimization_barrier(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(args)))
