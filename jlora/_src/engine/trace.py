"""`trace`: how a model consumes each of its weights, read off its jaxpr instead of guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jlora._src import paths
from jlora._src.engine import compat
from jlora._src.engine.dependence import auxiliary_equations
from jlora._src.engine.gradient import ZERO_DERIVATIVE, inexact, live_inner_results, reached_variables
from jlora._src.engine.location import Location
from jlora._src.engine.rules.table import PRIMITIVES, SQUARED, SQUARES
from jlora._src.engine.staging import check_callable, is_array, stage
from jlora._src.engine.traced_weights import (
    ADAPTED,
    CONSTANT,
    DATA,
    NO_AXES,
    PARAMETER,
    STOPPED_DATA,
    MatrixUse,
    Requirement,
    TracedWeight,
    Value,
    combined_kind,
    weights_in,
)
from jlora._src.types import NO_FORM, Path, PyTree, Use, WeightUse, is_attached

NORM = "a sum of its squares has no matrix form"


def trace(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> dict[Path, WeightUse]:
    """How ``fn(params, *args, **kwargs)`` consumes every floating leaf of ``params``.

    Abstract: nothing is computed, and arrays may be `jax.ShapeDtypeStruct`. A stacked layer axis, an expert axis and an
    axis indexed by a scalar are batch axes; contracted axes are inputs, the others outputs; the rows of a looked-up
    table are its inputs. If products differ, the axes with the most computation win, so trace with a batch of the usual
    size. Looks inside scan, cond, while, remat, jit, shard_map and custom derivatives, and follows a weight through
    casts, transposes, reshapes and other rearrangements.

    >>> uses = jlora.trace(model.apply, params, batch)
    >>> uses["params/query/kernel"].axes
    Axes(batch=(), inputs=(0,), outputs=(1, 2))

    Args:
      fn: the model's function; its first argument is the parameter tree.
      params: the parameters, or their shapes.
      *args, **kwargs: the other arguments; non-arrays are static.

    Returns:
      ``{path: WeightUse}`` in the tree's order: every floating leaf, and any integer or complex one that a product
      or a lookup consumes, such as a quantized base.
    """
    check_callable(fn, "trace")
    leaves, _ = paths.named_leaves(params)
    staged = stage(fn, (params, *args), kwargs)
    weights = {path: leaf for path, leaf in leaves.items() if is_array(leaf) or is_attached(leaf)}
    values: list[Value] = [DATA] * len(staged.leaves)
    for i, (path, leaf) in enumerate(weights.items()):  # the parameters' arrays come first, in the tree's order
        dims = tuple(frozenset({d}) for d in range(leaf.ndim))
        weight = TracedWeight(path, tuple(leaf.shape), dims, adaptable=jnp.issubdtype(leaf.dtype, jnp.floating))
        values[i] = (weight,) if jnp.issubdtype(leaf.dtype, jnp.number) else PARAMETER
    live = [inexact(v) for v in staged.jaxpr.outvars]
    parameters = [i < len(weights) for i in range(len(values))]
    walker = _Walker(auxiliary_equations(staged.jaxpr, live, parameters) if any(live) else set())
    results = walker.walk(staged.jaxpr, [CONSTANT] * len(staged.consts), values, live if any(live) else True)
    walker.record_returned_lookups(results)
    uses = {p: WeightUse(tuple(x.shape), x.dtype, tuple(walker.uses_of(p))) for p, x in weights.items()}
    return {
        path: use
        for path, use in uses.items()
        if jnp.issubdtype(use.dtype, jnp.floating) or (use.axes is not None and jnp.issubdtype(use.dtype, jnp.number))
    }


class _Walker:
    """Follows weights through a jaxpr and its inner jaxprs, and records where they are consumed.

    Attributes:
      recorded: for each weight, its uses; what each requires of its axes' roles; and, for a use that may concern a
        row or column (or one per matrix of a stack) instead of a weight, the roles for which it does.
      auxiliary: the ids of equations that do not determine inputs and outputs; see `auxiliary_equations`.
      live: whether the gradient of a result reaches the current equation.
      location: the place of the current equation.
    """

    def __init__(self, auxiliary: set[int]) -> None:
        self.auxiliary = auxiliary
        self.recorded: dict[Path, list[tuple[Use, tuple[Requirement, ...], Requirement | None]]] = {}
        self.live = True
        self.location = Location()
        self._live_results: list[bool] = []
        self._broadcasts: dict[Any, tuple[Sequence[int], Sequence[int]]] = {}

    def walk(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], live: Sequence[bool] | bool
    ) -> list[Value]:
        """The values of an open jaxpr's results. ``live`` flags the results at which a gradient enters, or states that
        one reaches all of the jaxpr, or none of it."""
        env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        reached = None if isinstance(live, bool) else reached_variables(jaxpr, live)

        def read(atom: Any) -> Value:
            return CONSTANT if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            self._live_results = [bool(live) if reached is None else v in reached for v in eqn.outvars]
            self.live = any(self._live_results) or bool(eqn.effects)
            env.update(zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inner(self, eqn: Any, closed: Any, args: Sequence[Value], live: bool | None = None) -> list[Value]:
        """The results of a jaxpr inside ``eqn``; by default a gradient enters it as it enters ``eqn``."""
        jaxpr, consts = compat.open_jaxpr(closed)
        outside = self.live, self._live_results
        entering = live_inner_results(eqn, self._live_results) if live is None else live
        try:
            with self.location.inside(eqn):
                return self.walk(jaxpr, [CONSTANT] * len(consts), args, entering)
        finally:
            self.live, self._live_results = outside

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        """The values of one equation's results."""
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            self._broadcasts[eqn.outvars[0]] = (eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"])
        if not any(map(weights_in, values)):
            kind = combined_kind(values)
            if kind == ADAPTED and name in ZERO_DERIVATIVE:
                kind = PARAMETER
            return [STOPPED_DATA if kind == DATA and name == "stop_gradient" else kind] * len(eqn.outvars)
        if name not in SQUARES and any(weight.squared for value in values for weight in weights_in(value)):
            return self.consume(eqn, values, lambda _, weight: SQUARED if weight.squared else NO_FORM)
        primitive = PRIMITIVES.get(name)
        return self.consume(eqn, values) if primitive is None else primitive.label(self, eqn, values)

    def nonconstant_dims(self, atom: Any) -> list[int]:
        """The dimensions along which an operand is not known to be constant."""
        shape = atom.aval.shape
        known = None if isinstance(atom, core.Literal) else self._broadcasts.get(atom)
        sizes, dims = known or (shape, range(len(shape)))
        return [d for d, size in zip(dims, sizes, strict=True) if size != 1]

    def consume(
        self,
        eqn: Any,
        values: Sequence[Value],
        classify: Callable[[int, TracedWeight], MatrixUse | str] = lambda *_: NO_FORM,
    ) -> list[Value]:
        """Records a use of every weight among ``values``: ``classify(position, weight)`` is its use as a matrix, or why
        it has none."""
        source = self.location.source_line(eqn)
        for position, value in enumerate(values):
            for weight in weights_in(value):
                found = classify(position, weight)
                if isinstance(found, MatrixUse) and id(eqn) in self.auxiliary:
                    found = found._replace(work=0)
                self._record(weight, eqn.primitive.name, found, source)
        return [combined_kind(values)] * len(eqn.outvars)

    def _record(self, weight: TracedWeight, primitive: str, found: MatrixUse | str, source: str) -> None:
        if weight.stopped:
            return
        requirements: tuple[Requirement, ...] = ()
        row: Requirement | None = None
        live = self.live or not weight.adaptable  # an integer never has a gradient
        if isinstance(found, MatrixUse):
            why = (weight.materialized or found.materialized) if weight.adaptable else ""
            note = why or (NORM if found.axes is None else "")
            work = found.work * self.location.repeats
            use = Use(primitive, found.axes, source, note, bool(why), live, work)
            requirements = weight.requirements + found.requirements if weight.adaptable else ()
        elif weight.lookup is not None:
            use = weight.lookup._replace(gradient=live)
        else:
            stops = primitive == "stop_gradient"
            use = Use(primitive, None, source, found, not stops and not weight.is_row, live and not stops)
            row = Requirement(NO_AXES.union(*weight.dims), False, "")
        self.recorded.setdefault(weight.path, []).append((use, requirements, row))

    def record_returned_lookups(self, results: Sequence[Value]) -> None:
        """Records the lookups whose rows the program returns."""
        for weight in (w for value in results for w in weights_in(value)):
            if weight.lookup is not None:
                self.recorded.setdefault(weight.path, []).append((weight.lookup, (), None))

    def uses_of(self, path: Path) -> list[Use]:
        """A weight's uses. Whether one materializes it may depend on its roles, known only after all uses."""
        recorded = self.recorded.get(path, [])
        roles = WeightUse((), None, tuple(use for use, *_ in recorded)).axes

        def resolved(use: Use, requirements: Sequence[Requirement], row: Requirement | None) -> Use:
            if row is not None and roles is not None and row.holds(roles):
                return use._replace(summed=False)
            broken = [r.why for r in requirements if roles is not None and not r.holds(roles)]
            return use if use.summed or not broken else use._replace(summed=True, note=broken[0])

        return [resolved(*entry) for entry in recorded]
