"""`trace`: how a model consumes each of its weights, read off its jaxpr instead of guessed from names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jlora._src import paths
from jlora._src.engine import compat
from jlora._src.engine.dependence import auxiliary
from jlora._src.engine.gradient import FLAT, inexact, inside, reached
from jlora._src.engine.probes import (
    CONST,
    DATA,
    LEARNED,
    PARAM,
    STILL,
    UNIT,
    Demand,
    Found,
    Probe,
    Value,
    joined,
    probes,
)
from jlora._src.engine.rules.table import PRIMITIVES, SQUARED, SQUARES
from jlora._src.engine.staging import is_array, stage
from jlora._src.types import NO_FORM, Path, PyTree, Use, WeightUse, is_attached

NORM = "a sum of its squares has no matrix form"


def trace(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> dict[Path, WeightUse]:
    """How ``fn(params, *args, **kwargs)`` consumes every floating leaf of ``params``.

    Abstract: nothing is computed, and arrays may be `jax.ShapeDtypeStruct`. A stacked layer axis, an expert
    axis and an axis indexed by a scalar are batch; contracted axes are inputs, the others outputs; the rows
    of a looked-up table are its inputs. Where products differ, the axes are those by which most is computed, so
    trace with a batch of the usual size. It sees through scan, cond, while, remat, jit, shard_map and custom
    derivatives, and through casts, transposes, reshapes and other rearrangements of a weight.

    >>> uses = jlora.trace(model.apply, params, batch)
    >>> uses["params/query/kernel"].axes
    Axes(batch=(), inputs=(0,), outputs=(1, 2))

    Args:
      fn: the model's function; its first argument is the parameter tree.
      params: the parameters, or their shapes.
      *args, **kwargs: the rest of the arguments; what is not an array is static.

    Returns:
      ``{path: WeightUse}`` in the tree's order: every floating leaf, and each integer or complex one that a product
      or a lookup consumes, as of a quantized base.
    """
    leaves, _ = paths.named_leaves(params)
    staged = stage(fn, (params, *args), kwargs)
    weights = {path: leaf for path, leaf in leaves.items() if is_array(leaf) or is_attached(leaf)}
    values: list[Value] = [DATA] * len(staged.given)
    for i, (path, leaf) in enumerate(weights.items()):  # the parameters' arrays come first, in the tree's order
        dims = tuple(frozenset({d}) for d in range(leaf.ndim))
        probe = Probe(path, tuple(leaf.shape), dims, plain=not jnp.issubdtype(leaf.dtype, jnp.floating))
        values[i] = (probe,) if jnp.issubdtype(leaf.dtype, jnp.number) else PARAM
    live = [inexact(v) for v in staged.jaxpr.outvars]
    parameters = [i < len(weights) for i in range(len(values))]
    walker = _Walker(auxiliary(staged.jaxpr, live, parameters) if any(live) else set())
    results = walker.walk(staged.jaxpr, [CONST] * len(staged.consts), values, live if any(live) else True)
    walker.hand_back(results)
    uses = {p: WeightUse(tuple(x.shape), x.dtype, tuple(walker.uses_of(p))) for p, x in weights.items()}
    return {
        path: use
        for path, use in uses.items()
        if jnp.issubdtype(use.dtype, jnp.floating) or (use.axes is not None and jnp.issubdtype(use.dtype, jnp.number))
    }


class _Walker:
    """Follows weights through a jaxpr and its inner jaxprs, and notes where they are consumed.

    Attributes:
      found: for each weight, its uses, what each demands of the roles of its axes, and where it is no weight that is
        used: it holds of a row or column, or of one for each matrix of a stack.
      auxiliary: the ids of equations that do not say what is input and output; see `dependence.auxiliary`.
      live: whether the gradient of a result reaches the equation under way.
      repeats: how often the equation runs: the lengths of the scans around it.
      around: the equations that enclose it, the innermost last.
    """

    def __init__(self, auxiliary: set[int]) -> None:
        self.auxiliary = auxiliary
        self.found: dict[Path, list[tuple[Use, tuple[Demand, ...], Demand | None]]] = {}
        self.live = True
        self.repeats = 1
        self.around: list[Any] = []
        self._results: list[bool] = []
        self._spread: dict[Any, tuple[Sequence[int], Sequence[int]]] = {}

    def walk(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], live: Sequence[bool] | bool
    ) -> list[Value]:
        """The values of an open jaxpr's results. ``live`` says by which of them a gradient enters, or that one
        reaches all of it, or none."""
        env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        carrying = None if isinstance(live, bool) else reached(jaxpr, live)

        def read(atom: Any) -> Value:
            return CONST if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            self._results = [bool(live) if carrying is None else v in carrying for v in eqn.outvars]
            self.live = any(self._results) or bool(eqn.effects)
            env.update(zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inner(self, eqn: Any, closed: Any, args: Sequence[Value], live: bool | None = None) -> list[Value]:
        """The results of a jaxpr inside ``eqn``; by default a gradient enters it as it enters ``eqn``."""
        jaxpr, consts = compat.open_jaxpr(closed)
        outside = self.live, self._results
        self.around.append(eqn)
        entering = inside(eqn, self._results) if live is None else live
        try:
            return self.walk(jaxpr, [CONST] * len(consts), args, entering)
        finally:
            self.live, self._results = outside
            self.around.pop()

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Count what happens inside ``times`` over."""
        outside, self.repeats = self.repeats, self.repeats * times
        try:
            yield
        finally:
            self.repeats = outside

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        if eqn.primitive.name == "broadcast_in_dim":
            self._spread[eqn.outvars[0]] = (eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"])
        if not any(map(probes, values)):
            kind, name = joined(values), eqn.primitive.name
            if kind == LEARNED and name in FLAT:
                kind = PARAM
            return [STILL if kind == DATA and name == "stop_gradient" else kind] * len(eqn.outvars)
        if eqn.primitive.name not in SQUARES and any(probe.squared for value in values for probe in probes(value)):
            return self.consume(eqn, values, lambda _, probe: SQUARED if probe.squared else NO_FORM)
        primitive = PRIMITIVES.get(eqn.primitive.name)
        return self.consume(eqn, values) if primitive is None else primitive.label(self, eqn, values)

    def source_line(self, eqn: Any) -> str:
        """The user's line that made ``eqn``, or what is around it."""
        return compat.source_line(eqn, self.around)

    def support(self, atom: Any) -> list[int]:
        """The dimensions along which an operand is not known to be constant."""
        shape = atom.aval.shape
        known = None if isinstance(atom, core.Literal) else self._spread.get(atom)
        sizes, dims = known or (shape, range(len(shape)))
        return [d for d, size in zip(dims, sizes, strict=True) if size != 1]

    def consume(
        self, eqn: Any, values: Sequence[Value], find: Callable[[int, Probe], Found | str] | None = None
    ) -> list[Value]:
        """Notes a use of every weight among ``values``; ``find(position, probe)`` says which, or why it is none."""
        name, source = eqn.primitive.name, self.source_line(eqn)
        for position, value in enumerate(values):
            for probe in probes(value):
                found = find(position, probe) if find else NO_FORM
                if isinstance(found, Found) and id(eqn) in self.auxiliary:
                    found = found._replace(work=0)
                self.note(probe, name, found, source)
        return [joined(values)] * len(eqn.outvars)

    def note(self, probe: Probe, name: str, found: Found | str, source: str) -> None:
        if probe.stopped:
            return
        demands: tuple[Demand, ...] = ()
        row: Demand | None = None
        live = self.live or probe.plain  # an integer has no gradient, whatever it is used for
        if isinstance(found, Found):
            whole = "" if probe.plain else probe.whole or found.whole
            note = whole or (NORM if found.axes is None else "")
            use = Use(name, found.axes, source, note, bool(whole), live, found.work * self.repeats)
            demands = () if probe.plain else probe.demands + found.demands
        elif probe.lookup is not None:
            use = probe.lookup._replace(gradient=live)
        else:
            stops = name == "stop_gradient"
            use = Use(name, None, source, found, not stops and not probe.is_row, live and not stops)
            row = Demand(UNIT.union(*probe.dims), False, "")
        self.found.setdefault(probe.path, []).append((use, demands, row))

    def hand_back(self, results: Sequence[Value]) -> None:
        """Notes the lookups whose rows are results of the program."""
        for probe in (p for value in results for p in probes(value)):
            if probe.lookup is not None:
                self.found.setdefault(probe.path, []).append((probe.lookup, (), None))

    def uses_of(self, path: Path) -> list[Use]:
        """A weight's uses, each with what its roles make of it: they are known when all uses are."""
        found = self.found.get(path, [])
        roles = WeightUse((), None, tuple(use for use, *_ in found)).axes

        def settled(use: Use, demands: Sequence[Demand], row: Demand | None) -> Use:
            if row is not None and roles is not None and row.holds(roles):
                return use._replace(summed=False)
            broken = [d.why for d in demands if roles is not None and not d.holds(roles)]
            return use if use.summed or not broken else use._replace(summed=True, note=broken[0])

        return [settled(*each) for each in found]
