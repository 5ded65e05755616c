"""The abstract values of `trace`: weights with the axes that their dimensions hold, and kinds of all other values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jlora._src.types import Axes, Path, Use

NO_AXES: frozenset[int] = frozenset()


class Requirement(NamedTuple):
    """A condition on the roles of a weight's axes, under which it stays factored on its way to a product.

    Attributes:
      axes: some of the weight's axes.
      same_role: whether they must all have one role; else they must be axes of one factor (batch and inputs, or
        batch and outputs).
      why: the reason to report if it fails.
    """

    axes: frozenset[int]
    same_role: bool
    why: str

    def holds(self, roles: Axes) -> bool:
        batch, inputs, outputs = map(frozenset, roles)
        groups = (batch, inputs, outputs) if self.same_role else (batch | inputs, batch | outputs)
        return any(self.axes <= group for group in groups)


@dataclasses.dataclass(frozen=True)
class TracedWeight:
    """A weight on its way through the program.

    Attributes:
      path, shape: the weight's.
      dims: for each current dimension, the weight's axes that it holds.
      adaptable: False for an integer or complex weight, which is followed only to report its uses.
      stopped: whether it is behind a stop_gradient.
      lookup: the use to record if it proves to be a looked-up row, not a weight.
      requirements: the conditions under which it is still factored.
      materialized: why it is materialized already, whatever its roles; empty if it is not.
      multiplier_axes: None, or the axes of its trained multiplier.
      squared: whether this is the square of the weight, until summed.
    """

    path: Path
    shape: tuple[int, ...]
    dims: tuple[frozenset[int], ...]
    adaptable: bool = True
    stopped: bool = False
    lookup: Use | None = None
    requirements: tuple[Requirement, ...] = ()
    materialized: str = ""
    multiplier_axes: frozenset[int] | None = None
    squared: bool = False

    @property
    def is_row(self) -> bool:
        """Whether only a single row or column of the weight is left: a result, not a weight."""
        return sum(any(self.shape[axis] > 1 for axis in axes) for axes in self.dims) < 2

    @property
    def is_matrix(self) -> bool:
        """Whether it can get an adapter."""
        return self.adaptable and len(self.shape) > 1

    def axes_along(self, dims: Sequence[int]) -> frozenset[int]:
        """The weight's axes that these dimensions hold."""
        return NO_AXES.union(*(self.dims[d] for d in dims))


Value: TypeAlias = "tuple[TracedWeight, ...] | str"
"""A weight, or several combined ones; or the kind of any other value: DATA (depends on the other arguments),
STOPPED_DATA (the same behind a stop_gradient), ADAPTED (depends on a matrix among the parameters, so on its
adapter), PARAMETER (depends on other parameters alone), or CONSTANT (depends on no argument)."""
DATA, STOPPED_DATA, ADAPTED, PARAMETER, CONSTANT = "data", "stopped data", "adapted", "parameter", "constant"


class MatrixUse(NamedTuple):
    """A use of a weight as a matrix: the axes and work of a `Use`, its requirements on the roles, and why the
    weight is materialized for it, if so. A norm has no axes."""

    axes: Axes | None
    work: int = 0
    requirements: tuple[Requirement, ...] = ()
    materialized: str = ""


def axes_of(weight: TracedWeight, contracted: Sequence[int], batch: Sequence[int]) -> Axes | str:
    """The roles of the weight's axes, given its contracted and batch dimensions; or why it has none."""
    inputs, stacked = weight.axes_along(contracted), weight.axes_along(batch)
    outputs = weight.axes_along([d for d in range(len(weight.dims)) if d not in (*contracted, *batch)])
    if inputs & outputs or inputs & stacked or outputs & stacked:
        return "a part of one axis is contracted and another part is kept"
    if not inputs or not outputs:
        return "it is contracted whole: a vector, not a matrix" if inputs else "nothing of it is contracted"
    rest = frozenset(range(len(weight.shape))) - inputs - outputs
    return Axes(tuple(sorted(rest)), tuple(sorted(inputs)), tuple(sorted(outputs)))


def weights_in(value: Value) -> tuple[TracedWeight, ...]:
    return () if isinstance(value, str) else value


def is_data(value: Value) -> bool:
    """Whether a value depends on the other arguments."""
    return value in (DATA, STOPPED_DATA)


def is_adapted(value: Value) -> bool:
    """Whether a value made of parameters depends on a matrix that can be adapted."""
    return value == ADAPTED or any(w.is_matrix and not w.stopped for w in weights_in(value))


def combined_kind(values: Sequence[Value]) -> str:
    """The kind of a value computed from these, none of which is followed any further."""
    kinds = {v if isinstance(v, str) else ADAPTED if is_adapted(v) else PARAMETER for v in values}
    return next((kind for kind in (DATA, STOPPED_DATA, ADAPTED, PARAMETER) if kind in kinds), CONSTANT)


def require(value: Value, groups: Sequence[Sequence[int]], *, same_role: bool, why: str) -> Value:
    """A weight that stays factored only if the axes in each group of its dimensions have matching roles."""
    if isinstance(value, str):
        return value

    def strict(weight: TracedWeight) -> TracedWeight:
        held = (frozenset(axis for axis in weight.axes_along(group) if weight.shape[axis] > 1) for group in groups)
        new = [Requirement(axes, same_role, why) for axes in held if len(axes) > 1]
        return dataclasses.replace(weight, requirements=tuple(dict.fromkeys((*weight.requirements, *new))))

    return tuple(map(strict, value))


def mark_materialized(value: Value, why: str) -> Value:
    """Marks a weight as materialized, here or for the equations inside this one."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(w, materialized=w.materialized or why) for w in value)


def move_dims(value: Value, move: Callable[[Sequence[frozenset[int]]], Sequence[frozenset[int]]]) -> Value:
    """A weight with its dimensions rearranged by ``move``."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(w, dims=tuple(move(w.dims))) for w in value)


def broadcast(value: Value, before: Sequence[int], after: Sequence[int], place: Sequence[int] | None = None) -> Value:
    """A weight broadcast to a new shape: its dimensions move to ``place``, by default the last ones. A dimension
    broadcast from size 1 holds no axis."""
    place = range(len(after) - len(before), len(after)) if place is None else place
    olds = {new: old for old, new in enumerate(place) if before[old] == after[new]}
    return move_dims(value, lambda dims: [dims[olds[d]] if d in olds else NO_AXES for d in range(len(after))])


def stack_slices(value: Value, leading: dict[Path, frozenset[int]]) -> Value:
    """The stacked per-step results of a scan: slices of a stacked weight form that stack again."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(w, dims=(leading.get(w.path, NO_AXES), *w.dims)) for w in value)


def union(values: Sequence[Value]) -> Value:
    """All the weights among ``values``."""
    return tuple(dict.fromkeys(w for v in values for w in weights_in(v)))
