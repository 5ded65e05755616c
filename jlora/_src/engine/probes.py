"""What `trace` carries in the place of arrays: weights with the axes that their dimensions hold, or what is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jlora._src.types import Axes, Path, Use


class Demand(NamedTuple):
    """What must hold of a weight's roles for it to stay factored on its way to a product.

    Attributes:
      axes: some of the weight's.
      alike: whether they must all have one role; else they must be those of one factor (batch and inputs, or
        batch and outputs).
      why: what is said where it does not hold.
    """

    axes: frozenset[int]
    alike: bool
    why: str

    def holds(self, roles: Axes) -> bool:
        batch, inputs, outputs = map(frozenset, roles)
        fits = (batch, inputs, outputs) if self.alike else (batch | inputs, batch | outputs)
        return any(self.axes <= group for group in fits)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A weight on its way through the program.

    Attributes:
      path: of the weight.
      shape: of the weight.
      dims: for each current dimension, the weight's axes that it holds.
      plain: whether it cannot be adapted (integer or complex) and is followed to say what it is used for.
      stopped: whether it is behind a stop_gradient.
      lookup: the use to report if it turns out to be a looked-up row rather than a weight.
      demands: what must hold for it to be factored still.
      whole: why it is summed already, whatever its roles; empty when it is not.
      gained: None, or the weight's axes that a gain which learns follows.
      squared: whether this is the square of the weight, on its way to a sum.
    """

    path: Path
    shape: tuple[int, ...]
    dims: tuple[frozenset[int], ...]
    plain: bool = False
    stopped: bool = False
    lookup: Use | None = None
    demands: tuple[Demand, ...] = ()
    whole: str = ""
    gained: frozenset[int] | None = None
    squared: bool = False

    @property
    def is_row(self) -> bool:
        """Whether a single row or column of the weight is left, which is a result rather than a weight."""
        return sum(any(self.shape[axis] > 1 for axis in axes) for axes in self.dims) < 2


Value: TypeAlias = "tuple[Probe, ...] | str"
"""A weight, or several joined ones; or what is none: DATA (depends on the other arguments), STILL (the same behind a
stop_gradient), LEARNED (depends on a matrix among the parameters, and so on its adapter), PARAM (on other parameters
alone), or CONST (on nothing that is given)."""
DATA, STILL, LEARNED, PARAM, CONST = "data", "still", "learned", "param", "const"
UNIT: frozenset[int] = frozenset()


class Found(NamedTuple):
    """A product, as a label finds it: the axes and the work of a `Use`, demands on the roles, why it is summed.
    A norm has no axes."""

    axes: Axes | None
    work: int = 0
    demands: tuple[Demand, ...] = ()
    whole: str = ""


def axes_of(probe: Probe, contracted: Sequence[int], batch: Sequence[int]) -> Axes | str:
    """The weight's axes when these dimensions of the probe are contracted or batch, or why there are none."""
    inputs = UNIT.union(*(probe.dims[d] for d in contracted))
    stacked = UNIT.union(*(probe.dims[d] for d in batch))
    free = [probe.dims[d] for d in range(len(probe.dims)) if d not in (*contracted, *batch)]
    outputs = UNIT.union(*free)
    if inputs & outputs or inputs & stacked or outputs & stacked:
        return "a part of one axis is contracted and another part is kept"
    if not inputs or not outputs:
        return "it is contracted whole: a vector, not a matrix" if inputs else "nothing of it is contracted"
    rest = frozenset(range(len(probe.shape))) - inputs - outputs
    return Axes(tuple(sorted(rest)), tuple(sorted(inputs)), tuple(sorted(outputs)))


def probes(value: Value) -> tuple[Probe, ...]:
    return () if isinstance(value, str) else value


def is_data(value: Value) -> bool:
    """Whether a value depends on the other arguments."""
    return value in (DATA, STILL)


def joined(values: Sequence[Value]) -> str:
    """What is made of values none of which is followed any further."""
    kinds = {v if isinstance(v, str) else LEARNED if is_learned(v) else PARAM for v in values}
    return next((kind for kind in (DATA, STILL, LEARNED, PARAM) if kind in kinds), CONST)


def is_learned(value: Value) -> bool:
    """Whether a value made of parameters depends on a matrix that can be adapted."""
    return value == LEARNED or any(not (p.plain or p.stopped) and len(p.shape) > 1 for p in probes(value))


def demanding(value: Value, groups: Sequence[Sequence[int]], *, alike: bool, why: str) -> Value:
    """A weight that stays factored only if the axes in each group of its dimensions go together."""
    if isinstance(value, str):
        return value

    def strict(probe: Probe) -> Probe:
        held = [UNIT.union(*(probe.dims[d] for d in group)) for group in groups]
        sized = [frozenset(axis for axis in axes if probe.shape[axis] > 1) for axes in held]
        new = [Demand(axes, alike, why) for axes in sized if len(axes) > 1]
        return dataclasses.replace(probe, demands=tuple(dict.fromkeys((*probe.demands, *new))))

    return tuple(map(strict, value))


def summed(value: Value, why: str) -> Value:
    """A weight that has been summed, or will be for what is inside."""
    return value if isinstance(value, str) else tuple(dataclasses.replace(p, whole=p.whole or why) for p in value)


def moved(value: Value, move: Callable[[Sequence[frozenset[int]]], Sequence[frozenset[int]]]) -> Value:
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=tuple(move(p.dims))) for p in value)


def broadcast(value: Value, before: Sequence[int], after: Sequence[int], place: Sequence[int] | None = None) -> Value:
    """A weight whose dimensions, by default its last ones, lie at ``place``; one spread from size 1 holds no axis."""
    place = range(len(after) - len(before), len(after)) if place is None else place
    olds = {new: old for old, new in enumerate(place) if before[old] == after[new]}
    return moved(value, lambda dims: [dims[olds[d]] if d in olds else UNIT for d in range(len(after))])


def restacked(value: Value, lead: dict[Path, frozenset[int]]) -> Value:
    """What a scan hands on at every step: slices of a stacked weight are that stack again."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=(lead.get(p.path, UNIT), *p.dims)) for p in value)


def union(values: Sequence[Value]) -> Value:
    return tuple(dict.fromkeys(p for v in values if not isinstance(v, str) for p in v))
