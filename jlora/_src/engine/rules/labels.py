"""How `trace` follows a weight through each primitive: what its dimensions hold, and where it is consumed.

A label takes ``(walker, eqn, values)``, where some of ``values`` are weights, and returns the equation's values.
It stands beside the primitive's rule in `table`, and declines what the rule declines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jlora._src.engine import compat
from jlora._src.engine.probes import (
    CONST,
    DATA,
    UNIT,
    Demand,
    Found,
    Probe,
    Value,
    axes_of,
    broadcast,
    demanding,
    is_data,
    is_learned,
    joined,
    moved,
    probes,
    restacked,
    summed,
    union,
)
from jlora._src.engine.rules import arithmetic, control_flow, products
from jlora._src.engine.rules.moves import reshape_groups
from jlora._src.engine.rules.writes import BOTH_SIDES, NOT_WRITTEN_TO, PARTS, follows, written_dims
from jlora._src.types import Axes, Use

Label: TypeAlias = Callable[[Any, Any, list[Value]], list[Value]]


# Products and lookups: the axes are read off the dimension numbers.


def dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    sizes = [atom.aval.size for atom in eqn.invars]
    smaller = min((0, 1), key=lambda i: sizes[i])

    def found(i: int, probe: Probe) -> Found | str:
        other = values[1 - i]
        axes = axes_of(probe, contracted[i], batch[i])
        if isinstance(axes, str):
            return axes
        if probe.lookup and not is_data(other):
            return "a row of it is multiplied by another weight"
        two = i == smaller and any(not p.plain and len(p.shape) > 1 for p in probes(other))
        work = _work(eqn, i, contracted[i]) if other == DATA else 0
        if two:
            return Found(axes, work, whole="the other operand is an adapted weight too")
        kept = UNIT.union(*(axes for d, axes in enumerate(probe.dims) if d not in (*contracted[i], *batch[i])))
        split = probe.gained and probe.gained & {*axes.inputs} and probe.gained & kept
        return Found(axes, work, whole=products.SPLIT_GAIN if split else "")

    return walker.consume(eqn, values, found)


def ragged_dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = ((), (*batch[1], *numbers.rhs_group_dimensions))
    whole = "" if products.is_standard_ragged(eqn) else products.NO_RAGGED_FORM

    def found(i: int, probe: Probe) -> Found | str:
        if i > 1:
            return "it is a group size"
        axes = axes_of(probe, contracted[i], groups[i])
        if isinstance(axes, str):
            return axes
        why = "the factors do not split into the contracted and the kept axes"
        apart = tuple(Demand(frozenset(group), True, why) for group in axes[1:])
        no_form = whole or _summed_gain(probe, axes) if i else products.NO_RAGGED_FORM
        return Found(axes, _work(eqn, i, contracted[i]), apart, no_form)

    return walker.consume(eqn, values, found)


def conv_general_dilated(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    kernel = eqn.params["dimension_numbers"].rhs_spec
    whole = products.NO_BATCH_GROUPS if eqn.params["batch_group_count"] != 1 else ""

    def found(i: int, probe: Probe) -> Found | str:
        axes = axes_of(probe, kernel[1:], ()) if i == 1 else "it is the image of a convolution"
        if isinstance(axes, str):
            return axes
        why = "the factors do not split into the kernel's inputs and its output channels"
        apart = tuple(Demand(frozenset(group), True, why) for group in axes[1:])
        return Found(axes, _work(eqn, i, kernel[1:]), apart, whole or _summed_gain(probe, axes))

    return walker.consume(eqn, values, found)


def _summed_gain(probe: Probe, axes: Axes) -> str:
    return products.NO_KERNEL_GAIN if probe.gained and probe.gained & {*axes.batch, *axes.inputs} else ""


def gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Slices picked by data are rows that are looked up; those picked by a constant are a weight rearranged, if a
    product takes it."""
    table, index = values
    if isinstance(table, str) or any(not p.plain for p in probes(index)):
        return walker.consume(eqn, values)
    try:
        picked = products.picked_dims(eqn)
    except products.Decline as decline:
        reason = str(decline)
        return walker.consume(eqn, values, lambda *_: reason)
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    kept = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims]
    out = eqn.outvars[0].aval
    scalar = all(n == 1 for i, n in enumerate(out.shape) if i not in numbers.offset_dims)
    rows = sum(shape[d] > 1 for d in kept if d not in picked)
    source = walker.source_line(eqn)

    def pick(probe: Probe) -> Probe:
        constant = index == CONST and len(picked) == 1 and not scalar
        dims = [probe.dims[picked[0]] if constant else UNIT] * out.ndim
        for d, i in zip(kept, numbers.offset_dims, strict=True):
            dims[i] = UNIT if d in picked else probe.dims[d]
        found = axes_of(probe, picked, ())
        is_row = isinstance(found, Axes) and (rows == 1 or not scalar)
        lookup = Use("gather", found, source) if is_row and isinstance(found, Axes) else None
        return dataclasses.replace(probe, dims=tuple(dims), lookup=lookup)

    looked_up = tuple(map(pick, table))
    return [looked_up] if rows > 1 or index == CONST else walker.consume(eqn, [looked_up, index])


# Rearrangements: the dimensions move.


def keep(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Every dimension of the first operand stays where it is, in each of the results."""
    return walker.consume(eqn, values) if isinstance(values[0], str) else [values[0]] * len(eqn.outvars)


def convert_element_type(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A cast to another floating dtype; an integer weight is followed through its dequantization."""
    (value,), dtype = values, eqn.params["new_dtype"]
    adapted = any(not probe.plain for probe in probes(value))
    if adapted and not jnp.issubdtype(dtype, jnp.floating):
        return walker.consume(eqn, values, lambda *_: f"a cast to {dtype}")
    return values


def each(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """As many results as operands, each of which stays what it is."""
    return values


def transpose(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return [moved(values[0], lambda dims: [dims[d] for d in eqn.params["permutation"]])]


def squeeze(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    return [moved(values[0], lambda dims: [axes for d, axes in enumerate(dims) if d not in gone])]


def broadcast_in_dim(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [broadcast(values[0], before, after, eqn.params["broadcast_dimensions"])]


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

    merged = [olds for olds, _ in groups if len(olds) > 1]
    why = f"reshape from {before} to {after} merges axes of different roles"
    return [moved(demanding(values[0], merged, alike=True, why=why), move)]


def concatenate(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    if any(map(is_data, values)):
        return walker.consume(eqn, values)
    joined, axis = union(values), eqn.params["dimension"]
    gains = {probe.gained for probe in probes(joined) if probe.gained is not None}
    along = [probe.dims[axis] for probe in probes(joined) if probe.gained is not None]
    fits = len(gains) <= 1 and all(axes and axes <= gained for axes in along for gained in gains)
    return [joined if fits else summed(joined, products.JOINED)]


def stack(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    if any(map(is_data, values)):
        return walker.consume(eqn, values)
    return [moved(union(values), lambda dims: [*dims[:at], UNIT, *dims[at:]])]


def unstack(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    return [moved(values[0], lambda dims: [*dims[:at], *dims[at + 1 :]])] * len(eqn.outvars)


def scale(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """``mul`` and ``div``: a weight by a scalar, or by what follows the axes of one factor."""
    if eqn.invars[0] is eqn.invars[1] and eqn.primitive.name == "mul":
        return square(walker, eqn, values[:1])
    if _applied(eqn, values):
        return walker.consume(eqn, values)
    shape, out = eqn.outvars[0].aval.shape, []
    for i, (atom, value) in enumerate(zip(eqn.invars, values, strict=True)):
        other = values[1 - i]
        follows = walker.support(eqn.invars[1 - i])
        why = "a product with an array that follows inputs and outputs at once"
        followed = demanding(broadcast(value, atom.aval.shape, shape), [follows], alike=False, why=why)
        for probe in probes(followed):
            entries = {d for d, axes in enumerate(probe.dims) if any(probe.shape[axis] > 1 for axis in axes)}
            if not probe.plain and (i and eqn.primitive.name == "div"):
                walker.consume(eqn, [(probe,)], lambda *_: "it is divided by")
            elif not probe.plain and probes(other) and entries <= set(follows):
                walker.consume(eqn, [(probe,)], lambda *_: "it meets another weight entry by entry")
            elif is_learned(other) and not probe.is_row:
                gained = UNIT.union(probe.gained or UNIT, *(probe.dims[d] for d in follows))
                out.append(dataclasses.replace(probe, gained=gained))
            else:
                out.append(probe)
    return [tuple(dict.fromkeys(out)) or joined(values)]


def square(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A square is followed to its sum."""
    if eqn.params.get("y", 2) != 2:
        return walker.consume(eqn, values)
    whole = tuple(probe for probe in probes(values[0]) if not (probe.is_row or probe.plain or probe.lookup))
    walker.consume(eqn, [tuple(probe for probe in probes(values[0]) if probe not in whole)])
    return [tuple(dataclasses.replace(probe, squared=True) for probe in whole) or joined(values)]


def reduce_sum(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A sum of entries is a weight again, mostly a row; one of squares is the norm of a weight."""
    shape, gone = eqn.invars[0].aval.shape, {int(d) for d in eqn.params["axes"]}
    kept = [d for d in range(len(shape)) if d not in gone]
    out: list[Probe] = []
    for probe in probes(values[0]):
        over = UNIT.union(*(probe.dims[d] for d in gone))
        if probe.plain or probe.lookup:
            walker.consume(eqn, [(probe,)])
        elif probe.gained and probe.gained & over:
            walker.consume(eqn, [(probe,)], lambda *_: arithmetic.GAIN_SUMMED)
        elif probe.squared:
            (strict,) = probes(demanding((probe,), [kept], alike=False, why=arithmetic.NO_NORM))
            walker.consume(eqn, [(strict,)], lambda _, probe: Found(None))
        else:
            out.append(dataclasses.replace(probe, dims=tuple(probe.dims[d] for d in kept)))
    return [tuple(out) or joined(values)]


def add(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """``add`` and ``sub``: a weight made of weights and plain arrays."""
    if _applied(eqn, values):
        return walker.consume(eqn, values)
    shape = eqn.outvars[0].aval.shape
    both = [broadcast(v, atom.aval.shape, shape) for atom, v in zip(eqn.invars, values, strict=True)]
    alone = any(isinstance(v, str) for v in both)
    return [_without_parts(_joined_gains(union(both), alone))]


def _joined_gains(value: Value, alone: bool) -> Value:
    """Weights that are added: those with gains that learn are summed, but for one less its own mean."""
    gains = {(probe.path, probe.gained) for probe in probes(value)}
    fits = all(gained is None for _, gained in gains) or (len(gains) == 1 and not alone)
    return value if fits else summed(value, products.JOINED)


def _without_parts(value: Value) -> Value:
    """A weight and its own mean, or another part of it along the same axes, are one weight with the demands of both."""
    found = probes(value)

    def covers(one: Probe, part: Probe) -> bool:
        inside = all(x <= y for x, y in zip(part.dims, one.dims, strict=True))
        return inside and one.dims != part.dims and one.path == part.path and not part.lookup

    parts = {part: one for part in found for one in found if covers(one, part)}
    whole = [one for one in found if one not in parts]
    extra = {one: [d for part, of in parts.items() if of == one for d in part.demands] for one in whole}
    return tuple(dataclasses.replace(one, demands=tuple(dict.fromkeys((*one.demands, *extra[one])))) for one in whole)


def select_n(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A choice between weights, or a weight and an array, that follows the axes of one factor."""
    which, *cases = values
    if _applied(eqn, values) or any(not probe.plain for probe in probes(which)):
        return walker.consume(eqn, values)
    why = "the condition does not follow the axes of one factor"
    found = _joined_gains(union(cases) or joined(values), alone=True)
    return [demanding(found, [walker.support(eqn.invars[0])], alike=False, why=why)]


def overwrite(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A weight in which whole slices are set, along axes of one factor, is that weight."""
    dims = written_dims(eqn)
    if dims is None:
        return walker.consume(eqn, values, lambda *_: PARTS)
    if not follows(eqn, walker.support(eqn.invars[2 if "scatter" in eqn.primitive.name else 1])):
        return walker.consume(eqn, values, lambda *_: BOTH_SIDES)
    (weight,) = _written(walker, eqn, values) if eqn.primitive.name == "scatter-mul" else add_at(walker, eqn, values)
    return [demanding(weight, [dims], alike=False, why=BOTH_SIDES)]


def add_at(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A weight to slices of which constants or parameters are added is that weight, if no gain that learns is on it."""
    return [_joined_gains(value, alone=True) for value in _written(walker, eqn, values)]


def _written(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    weight, *others = values
    if isinstance(weight, str) or any(map(probes, others)) or any(p.lookup for p in weight):
        return walker.consume(eqn, values, lambda *_: NOT_WRITTEN_TO)
    at = 1 if eqn.primitive.name == "dynamic_update_slice" else 2
    return walker.consume(eqn, values) if is_data(values[at]) else [weight]


def _applied(eqn: Any, values: list[Value]) -> bool:
    """Whether an elementwise equation applies its weights to activations: to data of more than one entry."""
    pairs = zip(eqn.invars, values, strict=True)
    return any(is_data(value) and np.prod(atom.aval.shape, dtype=int) != 1 for atom, value in pairs)


def all_gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return values if eqn.params["tiled"] else walker.consume(eqn, values)


def stop_gradient(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    walker.consume(eqn, values, lambda *_: "its gradient is stopped")
    return [tuple(dataclasses.replace(p, stopped=True) for p in probes(values[0]))]


# Calls and control flow: the weight is followed inside.


def call(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.inner(eqn, eqn.params["jaxpr"], values)


def settled_call(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A call whose results are plain arrays."""
    return [summed(v, control_flow.LEAVES) for v in call(walker, eqn, values)]


def custom_rule(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A function with a derivative or batching rule of its own, which is taken to use all of its operands."""
    inside = [summed(v, control_flow.own_rule(eqn)) for v in values]
    return walker.inner(eqn, compat.call_of(eqn), inside, live=walker.live)


def cond(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    results = [walker.inner(eqn, branch, values[1:]) for branch in eqn.params["branches"]]
    return [_one_of(walker, eqn, choices) for choices in zip(*results, strict=True)]


def _one_of(walker: Any, eqn: Any, choices: Sequence[Value]) -> Value:
    """What a branch returns: a weight, or one of several; among activations it is consumed."""
    if any(map(is_data, choices)) and any(map(probes, choices)):
        return walker.consume(eqn, list(choices), lambda *_: control_flow.LEAVES)[0]
    found = union(choices)
    return summed(found, control_flow.LEAVES) if found else joined(choices)


def while_loop(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body, _ = compat.open_jaxpr(p["body_jaxpr"])
    carry = _carry(walker, eqn, values, values[n_cond + n_body :], body.invars[n_body:], body.outvars)
    walker.inner(eqn, p["cond_jaxpr"], [*values[:n_cond], *carry], live=False)
    walker.inner(eqn, p["body_jaxpr"], [*values[n_cond : n_cond + n_body], *carry])
    return carry


def scan(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    n_consts, n_carry = compat.scan_split(eqn.params)
    jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    carried = values[n_consts : n_consts + n_carry]
    carry = _carry(walker, eqn, values, carried, jaxpr.invars[n_consts:], jaxpr.outvars)
    stacked = values[n_consts + n_carry :]
    slices = [moved(v, lambda dims: dims[1:]) for v in stacked]
    with walker.repeated(eqn.params["length"]):
        results = walker.inner(eqn, eqn.params["jaxpr"], [*values[:n_consts], *carry, *slices])
    lead = {probe.path: probe.dims[0] for v in stacked for probe in probes(v)}
    return [*carry, *(restacked(v, lead) for v in results[n_carry:])]


def _carry(walker: Any, eqn: Any, values: list[Value], init: list[Value], invars: Any, outvars: Any) -> list[Value]:
    """A loop's carried values: a weight that every iteration hands on is still that weight."""
    kept: list[Value] = []
    for value, before, after in zip(init, invars, outvars, strict=False):
        if before is not after:
            walker.consume(eqn, [value], lambda *_: control_flow.LEAVES)
        kept.append(value if before is after else joined(values))
    return kept


def _work(eqn: Any, i: int, contracted: Sequence[int]) -> int:
    """The multiplications of a product: one for each entry of the result and each term that is summed for it."""
    shape = eqn.invars[i].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
