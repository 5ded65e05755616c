"""How `trace` follows a weight through each primitive: what its dimensions hold, and where it is consumed.

A label takes ``(walker, eqn, values)``, where some of ``values`` are weights, and returns the equation's values.
It stands beside the primitive's rule in `_primitives`, and declines what the rule declines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from jlora import _compat
from jlora._rearrange import reshape_groups
from jlora._types import Axes, Path, Use


@dataclasses.dataclass(frozen=True)
class Probe:
    """A weight on its way through the program.

    Attributes:
      path: of the weight.
      ndim: of the weight.
      dims: for each current dimension, the weight's axes that it holds.
      stopped: whether it is behind a stop_gradient.
      lookup: the use to report if it turns out to be a looked-up row rather than a weight.
    """

    path: Path
    ndim: int
    dims: tuple[frozenset[int], ...]
    stopped: bool = False
    lookup: Use | None = None


Value: TypeAlias = "tuple[Probe, ...] | str"
"""A weight, or several joined ones; or DATA (depends on the other arguments); or CONST (does not)."""
DATA, CONST = "data", "const"
UNIT: frozenset[int] = frozenset()

Label: TypeAlias = Callable[[Any, Any, list[Value]], list[Value]]


# Products and lookups: the axes are read off the dimension numbers.


def dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    return walker.consume(eqn, values, lambda i, probe: _axes(probe, contracted[i], batch[i]))


def ragged_dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = ((), (*batch[1], *numbers.rhs_group_dimensions))
    return walker.consume(
        eqn, values, lambda i, probe: _axes(probe, contracted[i], groups[i]) if i < 2 else "it is a group size"
    )


def conv_general_dilated(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    kernel = eqn.params["dimension_numbers"].rhs_spec
    return walker.consume(
        eqn, values, lambda i, probe: _axes(probe, kernel[1:], ()) if i == 1 else "it is the image of a convolution"
    )


def gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    table, index = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if isinstance(table, str) or not isinstance(index, str) or numbers.operand_batching_dims:
        return walker.consume(eqn, values)
    shape = eqn.invars[0].aval.shape
    picked = [d for d, n in enumerate(sizes) if n == 1 != shape[d] or d in numbers.collapsed_slice_dims]
    if any(sizes[d] != shape[d] for d in range(len(shape)) if d not in picked):
        return walker.consume(eqn, values)
    kept = [d for d in range(len(sizes)) if d not in numbers.collapsed_slice_dims]
    out = eqn.outvars[0].aval
    scalar = all(n == 1 for i, n in enumerate(out.shape) if i not in numbers.offset_dims)
    rows = sum(shape[d] > 1 for d in kept if d not in picked)
    source = _compat.source_line(eqn)

    def pick(probe: Probe) -> Probe:
        dims = [UNIT] * out.ndim
        for d, i in zip(kept, numbers.offset_dims, strict=True):
            dims[i] = UNIT if d in picked else probe.dims[d]
        found = _axes(probe, picked, ())
        lookup = Use("gather", found, source) if isinstance(found, Axes) and (rows == 1 or not scalar) else None
        return dataclasses.replace(probe, dims=tuple(dims), lookup=lookup)

    looked_up = tuple(map(pick, table))
    return [looked_up] if rows > 1 else walker.consume(eqn, [looked_up, index])


# Rearrangements: the dimensions move.


def keep(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Every dimension of the first operand stays where it is, in each of the results."""
    return walker.consume(eqn, values) if isinstance(values[0], str) else [values[0]] * len(eqn.outvars)


def optimization_barrier(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return values


def transpose(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return [_moved(values[0], lambda dims: [dims[d] for d in eqn.params["permutation"]])]


def squeeze(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    return [_moved(values[0], lambda dims: [axes for d, axes in enumerate(dims) if d not in gone])]


def broadcast_in_dim(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [_broadcast(values[0], before, after, eqn.params["broadcast_dimensions"])]


def reshape(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    groups = reshape_groups(before, after)
    if groups is None:
        return walker.consume(eqn, values)

    def move(dims: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        new = [UNIT] * len(after)
        for olds, news in groups:
            for d in news:
                new[d] = UNIT.union(*(dims[o] for o in olds))
        return new

    return [_moved(values[0], move)]


def concatenate(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.consume(eqn, values) if DATA in values else [_union(values)]


def stack(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    if DATA in values:
        return walker.consume(eqn, values)
    return [_moved(_union(values), lambda dims: [*dims[:at], UNIT, *dims[at:]])]


def elementwise(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A weight made of weights, unless data of more than one entry is among them: then it is applied to activations."""
    pairs = zip(eqn.invars, values, strict=True)
    if any(value == DATA and np.prod(atom.aval.shape, dtype=int) != 1 for atom, value in pairs):
        return walker.consume(eqn, values)
    shape = eqn.outvars[0].aval.shape
    return [_union([_broadcast(v, atom.aval.shape, shape) for atom, v in zip(eqn.invars, values, strict=True)])]


def all_gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return values if eqn.params["tiled"] else walker.consume(eqn, values)


def stop_gradient(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    walker.consume(eqn, values, lambda *_: "its gradient is stopped")
    (value,) = values
    return [tuple(dataclasses.replace(p, stopped=True) for p in value) if not isinstance(value, str) else value]


# Calls and control flow: the weight is followed inside.


def call(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.inner(eqn.params["jaxpr"], values)


def custom_rule(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.inner(eqn.params["call_jaxpr"], values)


def cond(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    results = [walker.inner(branch, values[1:]) for branch in eqn.params["branches"]]
    return [_one_of(walker, eqn, choices) for choices in zip(*results, strict=True)]


def _one_of(walker: Any, eqn: Any, choices: Sequence[Value]) -> Value:
    """What a branch returns: a weight, or one of several; among activations it is consumed."""
    if all(v == choices[0] for v in choices):
        return choices[0]
    return walker.consume(eqn, list(choices))[0] if DATA in choices else _union(choices)


def while_loop(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body, _ = _compat.open_jaxpr(p["body_jaxpr"])
    carry = _carry(walker, eqn, values[n_cond + n_body :], body.invars[n_body:], body.outvars)
    walker.inner(p["cond_jaxpr"], [*values[:n_cond], *carry])
    walker.inner(p["body_jaxpr"], [*values[n_cond : n_cond + n_body], *carry])
    return carry


def scan(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    n_consts, n_carry = _compat.scan_split(eqn.params)
    jaxpr, _ = _compat.open_jaxpr(eqn.params["jaxpr"])
    carry = _carry(walker, eqn, values[n_consts : n_consts + n_carry], jaxpr.invars[n_consts:], jaxpr.outvars)
    stacked = values[n_consts + n_carry :]
    slices = [_moved(v, lambda dims: dims[1:]) for v in stacked]
    results = walker.inner(eqn.params["jaxpr"], [*values[:n_consts], *carry, *slices])
    lead = {probe.path: probe.dims[0] for v in stacked if not isinstance(v, str) for probe in v}
    return [*carry, *(_restacked(v, lead) for v in results[n_carry:])]


def _carry(walker: Any, eqn: Any, init: list[Value], invars: Any, outvars: Any) -> list[Value]:
    """A loop's carried values: a weight that every iteration hands on is still that weight."""
    kept: list[Value] = []
    for value, before, after in zip(init, invars, outvars, strict=False):
        if not isinstance(value, str) and before is not after:
            walker.consume(eqn, [value])
        kept.append(value if before is after else DATA)
    return kept


def _axes(probe: Probe, contracted: Sequence[int], batch: Sequence[int]) -> Axes | str:
    """The weight's axes when these dimensions of the probe are contracted or batch, or why there are none."""
    inputs = UNIT.union(*(probe.dims[d] for d in contracted))
    stacked = UNIT.union(*(probe.dims[d] for d in batch))
    free = [probe.dims[d] for d in range(len(probe.dims)) if d not in (*contracted, *batch)]
    outputs = UNIT.union(*free)
    if inputs & outputs or inputs & stacked or outputs & stacked:
        return "a part of one axis is contracted and another part is kept"
    if not inputs or not outputs:
        return "it is contracted whole: a vector, not a matrix" if inputs else "nothing of it is contracted"
    rest = frozenset(range(probe.ndim)) - inputs - outputs
    return Axes(tuple(sorted(rest)), tuple(sorted(inputs)), tuple(sorted(outputs)))


def _moved(value: Value, move: Callable[[Sequence[frozenset[int]]], Sequence[frozenset[int]]]) -> Value:
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=tuple(move(p.dims))) for p in value)


def _broadcast(value: Value, before: Sequence[int], after: Sequence[int], place: Sequence[int] | None = None) -> Value:
    """A weight whose dimensions, by default its last ones, lie at ``place``; one spread from size 1 holds no axis."""
    place = range(len(after) - len(before), len(after)) if place is None else place
    olds = {new: old for old, new in enumerate(place) if before[old] == after[new]}
    return _moved(value, lambda dims: [dims[olds[d]] if d in olds else UNIT for d in range(len(after))])


def _restacked(value: Value, lead: dict[Path, frozenset[int]]) -> Value:
    """What a scan hands on at every step: slices of a stacked weight are that stack again."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=(lead.get(p.path, UNIT), *p.dims)) for p in value)


def _union(values: Sequence[Value]) -> Value:
    return tuple(dict.fromkeys(p for v in values if not isinstance(v, str) for p in v))
