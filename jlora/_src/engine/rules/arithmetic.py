"""Rules for arithmetic on weights: sums, scales and choices, and the sums and squares that make means and norms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored, square_sum
from jlora._src.engine.named_axes import RANK, Leg, joined, wide, widened
from jlora._src.engine.rules.products import JOINED, Decline

NO_NORM = "a sum of squares that follows inputs and outputs at once"
GAIN_SUMMED = "a sum along a gain that learns, or DoRA's"


def neg(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    return [_on_smaller(dataclasses.replace(weight, base=base), jnp.negative)]


def scale(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``mul`` and ``div`` by a scalar, or by what follows the axes of one factor alone.

    A factor that learns becomes a gain: multiplied into the base, it would have a gradient as large as the weight.
    """
    if eqn.invars[0] is eqn.invars[1] and eqn.primitive.name == "mul":
        return square(scope, eqn, args[:1])
    weights = [i for i, v in enumerate(args) if isinstance(v, Factored)]
    at = min(weights, key=lambda i: args[i].is_row)  # a row by a weight is a factor of the weight
    if eqn.primitive.name == "div" and at == 1:
        raise Decline("not linear in one weight")
    weight, other = args[at], args[1 - at]
    if isinstance(other, Factored) and not other.is_row:
        raise Decline("not linear in one weight")
    other = scope.settle(other, eqn, "")
    if eqn.outvars[0].aval.shape != weight.shape:
        raise Decline("the weight is broadcast by the product")
    factor, dims = scope.support(eqn.invars[1 - at], other)
    name, carrying = carried(weight, dims)
    if name is None:
        raise Decline("a product with an array that follows inputs and outputs at once")
    factor = factor if eqn.primitive.name == "mul" else 1 / factor.astype(wide(factor.dtype))
    learned = (id(eqn), 1 - at) in scope.session.learned and not weight.is_row
    if learned and (gain := _gained(weight, Leg(factor, dims))) is not None:
        return [dataclasses.replace(weight, gain=gain)]
    (base,) = compat.bind(eqn, [weight.base if i == at else other for i in range(2)])
    return [dataclasses.replace(carrying, base=base, **{name: getattr(carrying, name).times(factor, dims)})]


def _gained(weight: Factored, factor: Leg) -> Leg | None:
    """The weight's gain times ``factor``; None where they follow inputs and outputs between them."""
    old = weight.gain
    if old is None:
        return Leg(widened(factor.array)[0], factor.dims)
    dims = tuple(dict.fromkeys((*old.dims, *factor.dims)))
    if carried(weight, dims)[0] is None:
        return None
    both = [following(leg, [d for d in dims if d not in leg.dims], weight.shape).ordered(dims) for leg in (old, factor)]
    return Leg(math.prod(widened(*both)), dims)


def square(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Put off until it is summed: see `reduce_sum`."""
    (weight,) = args
    if weight.is_row or (eqn.primitive.name == "integer_pow" and eqn.params["y"] != 2):
        raise Decline("not linear in one weight")
    return [dataclasses.replace(weight, squared=True)]


def reduce_sum(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A sum of entries is factored again, and mostly a row; one of squares is what DoRA's norm is made of."""
    (weight,) = args
    out, summed = eqn.outvars[0].aval, [int(d) for d in eqn.params["axes"]]
    kept = [d for d in range(len(weight.shape)) if d not in summed]
    gain = weight.gain
    if gain is not None and set(gain.dims) & set(summed):
        raise Decline(GAIN_SUMMED)
    if weight.squared:
        sized = [d for d in kept if weight.shape[d] != 1]
        name, weight = carried(weight, sized)
        if name is None:
            raise Decline(NO_NORM)
        result = square_sum(weight, sized).reshape(out.shape)
        if gain is not None:
            result = result * jnp.square(gain.spread(kept, out.shape))
        scope.factored(weight, eqn, 2 * weight.rank * weight.base.size)
        return [result.astype(out.dtype)]
    shared = [d for d in summed if d in weight.a.dims and d in weight.b.dims]
    if weight.key is not None and set(shared) & set(weight.key.dims):
        raise Decline("a sum over a stack of weights with active dropout")
    (base,) = compat.bind(eqn, [weight.base])
    place = {old: new for new, old in enumerate(kept)}

    def total(leg: Leg) -> Leg:
        """The leg summed; a dimension that both factors follow is one more of which the products are summed."""
        if RANK not in leg.dims or not set(leg.dims) & set(summed):
            return leg.renamed(place)
        rest = [d for d in leg.dims if d in kept]
        alone = [d for d in leg.dims if d in summed and d not in shared]
        array = widened(leg.ordered([*alone, *rest, *shared, RANK]))[0].sum(range(len(alone)))
        array = array.reshape(*array.shape[: len(rest)], -1)
        return Leg(array, (*(place[d] for d in rest), RANK))

    constant = math.prod(weight.shape[d] for d in summed if d not in weight.a.dims and d not in weight.b.dims)
    reduced = weight.with_legs(base, total)
    return [reduced if constant == 1 else _on_smaller(reduced, lambda array: array * constant)]


def add(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``add`` and ``sub``: a plain array joins the base; two weights' updates join along the rank."""
    minus = eqn.primitive.name == "sub"
    (base,) = compat.bind(eqn, [v.base if isinstance(v, Factored) else v for v in args])
    weights = [v for v in args if isinstance(v, Factored)]
    if all(v.shape != base.shape for v in weights):
        raise Decline("the weight is broadcast by the sum")
    if minus and isinstance(args[1], Factored):
        weights[-1] = _on_smaller(weights[-1], jnp.negative)
    if len(weights) == 1 and weights[0].gain is None:
        return [dataclasses.replace(weights[0], base=base)]
    return [added([_spread(v, base.shape) for v in weights], base, plain=len(weights) == 1)]


def _spread(weight: Factored, shape: tuple[int, ...]) -> Factored:
    """A weight that the sum broadcasts: its legs are constant along the dimensions which it had not, or of size 1."""
    lead = len(shape) - len(weight.shape)
    kept = {d: lead + d for d, size in enumerate(weight.shape) if size == shape[lead + d]}
    return weight.renamed(weight.base, kept)


def select_n(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A choice between weights, or a weight and an array, that is the same for every input and output."""
    which, *cases = args
    (base,) = compat.bind(eqn, [which, *(v.base if isinstance(v, Factored) else v for v in cases)])
    pick, dims = scope.support(eqn.invars[0], which)

    def chosen(i: int, weight: Factored) -> Factored:
        name, weight = carried(weight, dims)
        if name is None:
            raise Decline("the condition does not follow the axes of one factor")
        mask = pick == i if pick.dtype != jnp.bool_ else pick if i else ~pick
        return dataclasses.replace(weight, **{name: getattr(weight, name).times(mask, dims)})

    weights = [chosen(i, v) for i, v in enumerate(cases) if isinstance(v, Factored)]
    return [added(weights, base, plain=True)]


def added(weights: list[Factored], base: Any, *, plain: bool) -> Factored:
    """One value with the sum of the weights' updates: the factors are joined along the rank.

    A gain stays one if the weights share it and ``base`` is the sum of theirs alone, no ``plain`` array.
    """
    first = max(weights, key=lambda v: len(v.a.dims) + len(v.b.dims))  # the others may be constant along some axes
    if len(weights) == 1 and first.gain is None and first.key is None:
        return dataclasses.replace(first, base=base)
    alone = len(weights) == 1
    if any(alone or not _one_leg(weights, n) for n in ("gain", "key") if any(getattr(v, n) for v in weights)):
        raise Decline(JOINED)
    if plain and first.gain is not None:
        raise Decline(JOINED)

    def arrays(name: str) -> list[Any]:
        dims = getattr(first, name).dims
        given = [getattr(v, name) for v in weights]
        legs = [following(leg, [d for d in dims if d not in leg.dims], base.shape) for leg in given]
        if any(set(leg.dims) != set(dims) for leg in legs):
            raise Decline("the weights are not adapted alike")
        return [leg.ordered(dims) for leg in legs]

    def side_by_side(name: str) -> Leg:
        dims = getattr(first, name).dims
        return Leg(joined(arrays(name), dims.index(RANK)), dims)

    both = {"a": "b", "b": "a"}
    shared = next((name for name in both if _one_leg(weights, name)), None)
    if shared is None:
        legs = {name: side_by_side(name) for name in both}
    else:  # of one weight, such as one less its mean: the other factors add up, and the rank stays what it is
        name = both[shared]
        legs = {name: Leg(sum(widened(*arrays(name))), getattr(first, name).dims)}
    return dataclasses.replace(first, base=base, path=paths(weights), **legs)


def _one_leg(weights: list[Factored], name: str) -> bool:
    """Whether several weights have one leg of this name, the same array, or all of them none."""
    first, *rest = (getattr(v, name) for v in weights)
    if first is None:
        return all(leg is None for leg in rest)
    return all(leg is not None and leg.array is first.array and leg.dims == first.dims for leg in rest)


def _on_smaller(weight: Factored, fn: Callable[[Any], Any]) -> Factored:
    """The weight with a linear ``fn`` of its update: applied to the smaller factor, the other stays the same array."""
    leg = getattr(weight, weight.smaller)
    return dataclasses.replace(weight, **{weight.smaller: Leg(fn(leg.array), leg.dims)})


def paths(weights: list[Factored]) -> str:
    return ", ".join(dict.fromkeys(v.path for v in weights))


def following(leg: Leg, dims: list[int], shape: tuple[int, ...]) -> Leg:
    """``leg`` with an axis for each of ``dims`` more, along which it is constant."""
    if not dims:
        return leg
    sizes = (*(shape[d] for d in dims), *leg.array.shape)
    return Leg(lax.broadcast_in_dim(leg.array, sizes, range(len(dims), len(sizes))), (*dims, *leg.dims))


def carried(weight: Factored, dims: Sequence[int]) -> tuple[str | None, Factored]:
    """The factor that follows all of ``dims``, and the weight in which it does: where the whole update is constant
    along a dimension, either factor may follow it. None when two factors share ``dims`` between them."""
    own = [d for d in dims if d in weight.a.dims or d in weight.b.dims]
    choices = ("b", "a") if dims else (weight.smaller,)
    name = next((n for n in choices if set(own) <= set(getattr(weight, n).dims)), None)
    if name is None:
        return None, weight
    leg = following(getattr(weight, name), [d for d in dims if d not in own], weight.shape)
    return name, dataclasses.replace(weight, **{name: leg})
