"""Rules for primitives that write values into a weight: the rest of it stays factored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored
from jlora._src.engine.rules.arithmetic import carried
from jlora._src.engine.rules.products import JOINED, Decline

NOT_WRITTEN_TO = "an adapted weight is what is written"
PARTS = "parts of slices are set"
BOTH_SIDES = "values are set along inputs and outputs at once"


def overwrite(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``w.at[i].set(values)`` and ``lax.dynamic_update_slice``: there the update is zero; `multiply` scales it."""
    weight, *others = args
    if not isinstance(weight, Factored) or any(isinstance(v, Factored) for v in others):
        raise Decline(NOT_WRITTEN_TO)
    dims, (at, window), scales = written_dims(eqn), _values(eqn), eqn.primitive.name == "scatter-mul"
    if dims is None:
        raise Decline(PARTS)
    if not follows(eqn, scope.support(eqn.invars[at], args[at])[1]):
        raise Decline(BOTH_SIDES)
    if weight.gain is not None and not scales:
        raise Decline(JOINED)
    name, weight = carried(weight, dims)
    if name is None:
        raise Decline(BOTH_SIDES)
    (base,) = compat.bind(eqn, [weight.base, *others])
    # The same writing, of zeros or of the multipliers, into ones that have one entry along the other dimensions.
    shape = [n if window.get(i, -1) in (-1, *dims) else 1 for i, n in enumerate(args[at].shape)]
    others[at - 1] = lax.slice(args[at], [0] * len(shape), shape) if scales else jnp.zeros(shape, weight.dtype)
    ones = jnp.ones([n if d in dims else 1 for d, n in enumerate(weight.shape)], weight.dtype)
    (kept,) = compat.bind(eqn, [ones, *others])
    kept = lax.squeeze(kept, [d for d in range(kept.ndim) if d not in dims])
    return [dataclasses.replace(weight, base=base, **{name: getattr(weight, name).times(kept, sorted(dims))})]


def add_at(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``w.at[i].add(values)`` and ``subtract``: the values join the base."""
    weight, indices, values = args
    if not isinstance(weight, Factored) or isinstance(values, Factored):
        raise Decline(NOT_WRITTEN_TO)
    if weight.gain is not None:
        raise Decline(JOINED)
    (base,) = compat.bind(eqn, [weight.base, indices, values])
    return [dataclasses.replace(weight, base=base)]


def written_dims(eqn: Any) -> tuple[int, ...] | None:
    """The dimensions along which ``eqn`` writes whole slices into its first operand; None if parts of them."""
    at, window = _values(eqn)
    shape, values = eqn.invars[0].aval.shape, eqn.invars[at].aval.shape
    if at == 1:
        return tuple(d for d in range(len(shape)) if values[d] != shape[d])
    numbers = eqn.params["dimension_numbers"]
    dims = tuple(numbers.scatter_dims_to_operand_dims)
    whole = {d for i, d in window.items() if values[i] == shape[d]}
    parts = any(d not in dims and d not in whole for d in range(len(shape)))
    return None if parts or numbers.operand_batching_dims else dims


def follows(eqn: Any, support: Sequence[int]) -> bool:
    """Whether what multiplies slices, and is not constant along these of its dimensions, is so along the slices."""
    _, window = _values(eqn)
    dims = written_dims(eqn) or ()
    return eqn.primitive.name != "scatter-mul" or all(window.get(i, -1) in (-1, *dims) for i in support)


def _values(eqn: Any) -> tuple[int, dict[int, int]]:
    """Which operand has the values that ``eqn`` writes, and along which of the weight's dimensions theirs lie."""
    ndim = len(eqn.invars[0].aval.shape)
    if eqn.primitive.name == "dynamic_update_slice":
        return 1, {d: d for d in range(ndim)}
    numbers = eqn.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    return 2, dict(zip(numbers.update_window_dims, (d for d in range(ndim) if d not in gone), strict=True))
