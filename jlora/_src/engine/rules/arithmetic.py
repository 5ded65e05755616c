"""Arithmetic on weights: sums, scales and selections, and the sums and squares behind means and norms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._src.engine.factors.factored import Factored, square_sum
from jlora._src.engine.factors.named_axes import RANK, NamedArray, accumulation_dtype, promote_arrays
from jlora._src.engine.rules.joins import add_weights, label_sum
from jlora._src.engine.rules.rule import Decline, bind_base
from jlora._src.engine.traced_weights import (
    NO_AXES,
    MatrixUse,
    TracedWeight,
    Value,
    broadcast,
    combined_kind,
    is_adapted,
    is_data,
    require,
    union,
    weights_in,
)

MIXED_FACTOR = "a product with an array that varies along inputs and outputs at once"
MIXED_CONDITION = "the condition does not follow the axes of one factor"
MIXED_NORM = "a sum of squares that keeps inputs and outputs at once"
MULTIPLIER_SUMMED = "a sum along axes of the multiplier (DoRA's, or a trained one such as a norm)"
NOT_LINEAR = "not linear in one weight"


def neg(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = bind_base(eqn, args)
    return [dataclasses.replace(weight, base=base).map_smaller_factor(jnp.negative)]


def scale(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``mul`` and ``div`` by a scalar, or by an array that varies along the axes of one factor alone.

    A trained array becomes the multiplier: multiplied into the base, its gradient would be as large as the weight.
    """
    if _is_square(eqn):
        return square(scope, eqn, args[:1])
    weights = [i for i, v in enumerate(args) if isinstance(v, Factored)]
    at = min(weights, key=lambda i: args[i].is_row)  # of a row and a weight, the row scales the weight
    weight, other = args[at], args[1 - at]
    if (eqn.primitive.name == "div" and at == 1) or (isinstance(other, Factored) and not other.is_row):
        raise Decline(NOT_LINEAR)
    other = scope.materialize(other, eqn, "")
    if eqn.outvars[0].aval.shape != weight.shape:
        raise Decline("the weight is broadcast by the product")
    factor = scope.nonconstant_part(eqn.invars[1 - at], other)
    name, expanded = weight.factor_along(factor.dims)
    if name is None:
        raise Decline(MIXED_FACTOR)
    if eqn.primitive.name == "div":
        factor = factor.apply(lambda x: 1 / x.astype(accumulation_dtype(x.dtype)))
    trained = (id(eqn), 1 - at) in scope.session.trained_operands and not weight.is_row
    if trained and (multiplier := _multiplied(weight, factor)) is not None:
        return [dataclasses.replace(weight, multiplier=multiplier, nonzero=False)]
    (base,) = bind_base(eqn, [weight if i == at else other for i in range(2)])
    return [dataclasses.replace(expanded, base=base, **{name: getattr(expanded, name).times(factor)})]


def label_scale(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """``mul`` and ``div``: a weight by a scalar, or by an array that varies along the axes of one factor."""
    if _is_square(eqn):
        return label_square(walker, eqn, values[:1])
    if _applies_to_data(eqn, values):
        return walker.consume(eqn, values)
    shape = eqn.outvars[0].aval.shape
    out: list[TracedWeight] = []
    for i, (atom, value) in enumerate(zip(eqn.invars, values, strict=True)):
        other, varying = values[1 - i], walker.nonconstant_dims(eqn.invars[1 - i])
        scaled = require(broadcast(value, atom.aval.shape, shape), [varying], same_role=False, why=MIXED_FACTOR)
        for weight in weights_in(scaled):
            sized = {d for d, axes in enumerate(weight.dims) if any(weight.shape[axis] > 1 for axis in axes)}
            if weight.adaptable and i and eqn.primitive.name == "div":
                walker.consume(eqn, [(weight,)], lambda *_: "it is a divisor")
            elif weight.adaptable and weights_in(other) and sized <= set(varying):
                walker.consume(eqn, [(weight,)], lambda *_: "it is multiplied by another weight elementwise")
            elif is_adapted(other) and not weight.is_row:
                axes = (weight.multiplier_axes or NO_AXES) | weight.axes_along(varying)
                out.append(dataclasses.replace(weight, multiplier_axes=axes))
            else:
                out.append(weight)
    return [tuple(dict.fromkeys(out)) or combined_kind(values)]


def _multiplied(weight: Factored, factor: NamedArray) -> NamedArray | None:
    """The weight's multiplier times ``factor``; None if the two vary along inputs and outputs at once."""
    old = weight.multiplier
    if old is None:
        return factor.apply(lambda x: promote_arrays(x)[0])
    dims = tuple(dict.fromkeys((*old.dims, *factor.dims)))
    if weight.factor_along(dims)[0] is None:
        return None
    both = [part.expand(dims, weight.shape).transpose(dims) for part in (old, factor)]
    return NamedArray(math.prod(promote_arrays(*both)), dims)


def square(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Marks a square, to be summed by `reduce_sum`."""
    (weight,) = args
    if weight.is_row or (eqn.primitive.name == "integer_pow" and eqn.params["y"] != 2):
        raise Decline(NOT_LINEAR)
    return [dataclasses.replace(weight, squared=True)]


def label_square(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    if eqn.params.get("y", 2) != 2:
        return walker.consume(eqn, values)
    given = weights_in(values[0])
    squares = tuple(w for w in given if w.adaptable and not (w.is_row or w.lookup))
    walker.consume(eqn, [tuple(w for w in given if w not in squares)])
    return [tuple(dataclasses.replace(w, squared=True) for w in squares) or combined_kind(values)]


def _is_square(eqn: Any) -> bool:
    return eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]


def reduce_sum(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A sum of entries is factored again, usually a row; a sum of squares is the core of DoRA's norm."""
    (weight,) = args
    summed = [int(d) for d in eqn.params["axes"]]
    if weight.multiplier is not None and set(weight.multiplier.dims) & set(summed):
        raise Decline(MULTIPLIER_SUMMED)
    if weight.squared:
        return [_sum_of_squares(scope, eqn, weight, summed)]
    shared = [d for d in summed if d in weight.a.dims and d in weight.b.dims]
    if weight.key is not None and set(shared) & set(weight.key.dims):
        raise Decline("a sum over a stack of weights with active dropout")
    (base,) = bind_base(eqn, args)
    kept = [d for d in range(len(weight.shape)) if d not in summed]
    place = {old: new for new, old in enumerate(kept)}

    def total(part: NamedArray) -> NamedArray:
        """The part summed; a dimension of both factors becomes one more summed axis of their product."""
        if RANK not in part.dims or not set(part.dims) & set(summed):
            return part.rename(place)
        rest = [d for d in part.dims if d in kept]
        own = [d for d in part.dims if d in summed and d not in shared]
        array = promote_arrays(part.transpose([*own, *rest, *shared, RANK]))[0].sum(range(len(own)))
        array = array.reshape(*array.shape[: len(rest)], -1)
        return NamedArray(array, (*(place[d] for d in rest), RANK))

    constant = math.prod(weight.shape[d] for d in summed if d not in weight.a.dims and d not in weight.b.dims)
    reduced = weight.map_parts(base, total)
    return [reduced if constant == 1 else reduced.map_smaller_factor(lambda array: array * constant)]


def _sum_of_squares(scope: Any, eqn: Any, weight: Factored, summed: Sequence[int]) -> Any:
    out = eqn.outvars[0].aval
    kept = [d for d in range(len(weight.shape)) if d not in summed]
    sized = [d for d in kept if weight.shape[d] != 1]
    name, expanded = weight.factor_along(sized)
    if name is None:
        raise Decline(MIXED_NORM)
    result = square_sum(expanded, sized).reshape(out.shape)
    if weight.multiplier is not None:
        result = result * jnp.square(weight.multiplier.broadcast(kept, out.shape))
    scope.record_factored(weight, eqn, 2 * weight.rank * weight.base.size)
    return result.astype(out.dtype)


def label_reduce_sum(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A sum of entries is a weight again, usually a row; a sum of squares is a weight's norm."""
    shape, summed = eqn.invars[0].aval.shape, {int(d) for d in eqn.params["axes"]}
    kept = [d for d in range(len(shape)) if d not in summed]
    out: list[TracedWeight] = []
    for weight in weights_in(values[0]):
        if not weight.adaptable or weight.lookup:
            walker.consume(eqn, [(weight,)])
        elif weight.multiplier_axes and weight.multiplier_axes & weight.axes_along(list(summed)):
            walker.consume(eqn, [(weight,)], lambda *_: MULTIPLIER_SUMMED)
        elif weight.squared:
            norm = require((weight,), [kept], same_role=False, why=MIXED_NORM)
            walker.consume(eqn, [norm], lambda *_: MatrixUse(None))
        else:
            out.append(dataclasses.replace(weight, dims=tuple(weight.dims[d] for d in kept)))
    return [tuple(out) or combined_kind(values)]


def add(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``add`` and ``sub``: a plain array is added to the base; the updates of two weights are joined along the rank."""
    (base,) = bind_base(eqn, args)
    weights = [v for v in args if isinstance(v, Factored)]
    if all(v.shape != base.shape for v in weights):
        raise Decline("the weight is broadcast by the sum")
    if eqn.primitive.name == "sub" and isinstance(args[1], Factored):
        weights[-1] = weights[-1].map_smaller_factor(jnp.negative)
    if len(weights) == 1 and weights[0].multiplier is None:
        return [dataclasses.replace(weights[0], base=base)]
    return [add_weights([_broadcast(v, base.shape) for v in weights], base, with_array=len(weights) == 1)]


def _broadcast(weight: Factored, shape: tuple[int, ...]) -> Factored:
    """A weight broadcast by a sum: its parts are constant along new dimensions and those of size 1."""
    lead = len(shape) - len(weight.shape)
    kept = {d: lead + d for d, size in enumerate(weight.shape) if size == shape[lead + d]}
    return weight.rename_dims(weight.base, kept)


def label_add(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """``add`` and ``sub``: the sum of weights and plain arrays is a weight."""
    if _applies_to_data(eqn, values):
        return walker.consume(eqn, values)
    shape = eqn.outvars[0].aval.shape
    both = [broadcast(v, atom.aval.shape, shape) for atom, v in zip(eqn.invars, values, strict=True)]
    return [_merge_parts(label_sum(union(both), with_array=any(isinstance(v, str) for v in both)))]


def _merge_parts(value: Value) -> Value:
    """A weight and its own mean, or another part of it along the same axes, are one weight that must meet the
    requirements of both."""
    given = weights_in(value)

    def covers(one: TracedWeight, part: TracedWeight) -> bool:
        inside = all(x <= y for x, y in zip(part.dims, one.dims, strict=True))
        return inside and one.dims != part.dims and one.path == part.path and not part.lookup

    parts = {part: one for part in given for one in given if covers(one, part)}
    whole = [one for one in given if one not in parts]
    extra = {one: [r for part, of in parts.items() if of == one for r in part.requirements] for one in whole}
    return tuple(
        dataclasses.replace(one, requirements=tuple(dict.fromkeys((*one.requirements, *extra[one])))) for one in whole
    )


def select_n(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Select between weights, or a weight and an array, by a condition that varies along the axes of one factor."""
    which, *cases = args
    (base,) = bind_base(eqn, args)
    condition = scope.nonconstant_part(eqn.invars[0], which)

    def chosen(i: int, weight: Factored) -> Factored:
        name, weight = weight.factor_along(condition.dims)
        if name is None:
            raise Decline(MIXED_CONDITION)
        mask = condition.apply(lambda pick: pick == i if pick.dtype != jnp.bool_ else pick if i else ~pick)
        return dataclasses.replace(weight, **{name: getattr(weight, name).times(mask)})

    weights = [chosen(i, v) for i, v in enumerate(cases) if isinstance(v, Factored)]
    return [add_weights(weights, base, with_array=True)]


def label_select_n(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    which, *cases = values
    if _applies_to_data(eqn, values) or any(w.adaptable for w in weights_in(which)):
        return walker.consume(eqn, values)
    chosen = label_sum(union(cases) or combined_kind(values), with_array=True)
    return [require(chosen, [walker.nonconstant_dims(eqn.invars[0])], same_role=False, why=MIXED_CONDITION)]


def _applies_to_data(eqn: Any, values: list[Value]) -> bool:
    """Whether an elementwise equation applies its weights to activations: to data of more than one entry."""
    pairs = zip(eqn.invars, values, strict=True)
    return any(is_data(value) and np.prod(atom.aval.shape, dtype=int) != 1 for atom, value in pairs)
