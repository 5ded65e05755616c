"""Primitives that write values into a weight, whose rest stays factored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import NamedArray
from jlora._src.engine.rules.joins import JOINED, label_sum
from jlora._src.engine.rules.rule import Decline, bind_base
from jlora._src.engine.traced_weights import Value, is_data, require, weights_in

WRITTEN = "the values that are written are an adapted weight"
PARTS = "only parts of slices are written"
BOTH_SIDES = "values are written along inputs and outputs at once"


def overwrite(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``w.at[i].set(values)`` and ``lax.dynamic_update_slice``, which zero the update there, and
    ``w.at[i].multiply(values)``, which scales it."""
    weight, *others = args
    if not isinstance(weight, Factored) or any(isinstance(v, Factored) for v in others):
        raise Decline(WRITTEN)
    dims, (at, window), scales = _written_dims(eqn), _written_values(eqn), eqn.primitive.name == "scatter-mul"
    if dims is None:
        raise Decline(PARTS)
    if not _constant_in_slices(eqn, scope.nonconstant_part(eqn.invars[at], args[at]).dims):
        raise Decline(BOTH_SIDES)
    if weight.multiplier is not None and not scales:
        raise Decline(JOINED)
    name, weight = weight.factor_along(dims)
    if name is None:
        raise Decline(BOTH_SIDES)
    (base,) = bind_base(eqn, [weight, *others])
    # The factor's multiplier: the same write, of zeros or of the multiplying values, into ones with a single entry
    # along the other dimensions.
    shape = [n if window.get(i, -1) in (-1, *dims) else 1 for i, n in enumerate(args[at].shape)]
    others[at - 1] = lax.slice(args[at], [0] * len(shape), shape) if scales else jnp.zeros(shape, weight.dtype)
    ones = jnp.ones([n if d in dims else 1 for d, n in enumerate(weight.shape)], weight.dtype)
    (kept,) = compat.bind(eqn, [ones, *others])
    kept = NamedArray(lax.squeeze(kept, [d for d in range(kept.ndim) if d not in dims]), tuple(sorted(dims)))
    return [dataclasses.replace(weight, base=base, **{name: getattr(weight, name).times(kept)})]


def label_overwrite(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A weight stays that weight when whole slices are set along axes of one factor."""
    dims, (at, _) = _written_dims(eqn), _written_values(eqn)
    if dims is None:
        return walker.consume(eqn, values, lambda *_: PARTS)
    if not _constant_in_slices(eqn, walker.nonconstant_dims(eqn.invars[at])):
        return walker.consume(eqn, values, lambda *_: BOTH_SIDES)
    label = _label_written if eqn.primitive.name == "scatter-mul" else label_add_at
    (weight,) = label(walker, eqn, values)
    return [require(weight, [dims], same_role=False, why=BOTH_SIDES)]


def add_at(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``w.at[i].add(values)`` and ``subtract``: the values are added to the base."""
    weight, _, values = args
    if not isinstance(weight, Factored) or isinstance(values, Factored):
        raise Decline(WRITTEN)
    if weight.multiplier is not None:
        raise Decline(JOINED)
    (base,) = bind_base(eqn, args)
    return [dataclasses.replace(weight, base=base)]


def label_add_at(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Constants or parameters added to slices keep a weight that weight, unless it has a trained multiplier."""
    return [label_sum(value, with_array=True) for value in _label_written(walker, eqn, values)]


def _label_written(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    weight, *others = values
    if isinstance(weight, str) or any(map(weights_in, others)) or any(w.lookup for w in weight):
        return walker.consume(eqn, values, lambda *_: WRITTEN)
    at, _ = _written_values(eqn)
    return walker.consume(eqn, values) if is_data(values[at]) else [weight]


def _written_dims(eqn: Any) -> tuple[int, ...] | None:
    """The dimensions along which ``eqn`` writes whole slices into its first operand; None for parts of slices."""
    at, window = _written_values(eqn)
    shape, values = eqn.invars[0].aval.shape, eqn.invars[at].aval.shape
    if at == 1:
        return tuple(d for d in range(len(shape)) if values[d] != shape[d])
    numbers = eqn.params["dimension_numbers"]
    dims = tuple(numbers.scatter_dims_to_operand_dims)
    whole = {d for i, d in window.items() if values[i] == shape[d]}
    parts = any(d not in dims and d not in whole for d in range(len(shape)))
    return None if parts or numbers.operand_batching_dims else dims


def _constant_in_slices(eqn: Any, nonconstant: Sequence[int]) -> bool:
    """Whether values that multiply slices are constant along each slice, given the ``nonconstant`` dimensions."""
    _, window = _written_values(eqn)
    dims = _written_dims(eqn) or ()
    return eqn.primitive.name != "scatter-mul" or all(window.get(i, -1) in (-1, *dims) for i in nonconstant)


def _written_values(eqn: Any) -> tuple[int, dict[int, int]]:
    """The index of the operand with the written values, and the weight's dimension for each of its dimensions."""
    ndim = len(eqn.invars[0].aval.shape)
    if eqn.primitive.name == "dynamic_update_slice":
        return 1, {d: d for d in range(ndim)}
    numbers = eqn.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    return 2, dict(zip(numbers.update_window_dims, (d for d in range(ndim) if d not in gone), strict=True))
