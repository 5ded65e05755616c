"""The interpreter: evaluate a jaxpr in which some values are factored weights.

Read the operands; if none is factored, bind the equation as it is; else look its rule up; else apply the
materialize policy. Control flow and calls are in `control_flow`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored, dense
from jlora._src.engine.rules.products import Decline
from jlora._src.engine.rules.table import PRIMITIVES, SQUARED, SQUARES
from jlora._src.types import Path
from jlora.messages import bullets

Policy = Literal["warn", "error", "allow", "explain"]

REARRANGING = frozenset(
    "dot_general conv_general_dilated transpose reshape squeeze broadcast_in_dim convert_element_type copy copy_p name "
    "slice rev neg sharding_constraint jit pjit remat2 checkpoint".split()
)
"""Primitives by which rows that constant indices picked are still a weight; by any other they are looked up."""


class MaterializeWarning(UserWarning):
    """An adapted weight was summed to its full shape, because a primitive has no factored form."""


class MaterializeError(TypeError):
    """The same under ``materialize="error"``."""


class Event(NamedTuple):
    """One consumption of an adapted weight.

    Attributes:
      path: of the weight; several, joined by commas, when the model joined weights.
      primitive, source: what consumed it, and where.
      why: None when it stayed factored, else the reason why it was materialized.
      flops: floating-point operations that the update adds to the forward pass.
    """

    path: str
    primitive: str
    source: str
    why: str | None
    flops: int


@dataclasses.dataclass
class Session:
    """What is common to one call of a wrapped function: its policy, and what happened.

    Attributes:
      policy: what to do where a weight must be materialized.
      inline_custom_rules: whether to look into functions with a derivative rule of their own.
      constant: ids of the gather equations that pick the same entries at every call.
      learned: ids of products, and the positions of their operands through which something trains.
      repeats: how often the equations under evaluation run: the lengths of the scans around them.
      around: the equations that enclose those under evaluation, the innermost last.
      events: every consumption so far.
      masks: how many dropout masks were drawn for each weight.
      told: what there is to warn of: for each weight that was summed, two parts of the text, and the places.
    """

    policy: Policy
    inline_custom_rules: bool
    constant: set[int] = dataclasses.field(default_factory=set)
    learned: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    repeats: int = 1
    around: list[Any] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)
    masks: Counter[str] = dataclasses.field(default_factory=Counter)
    told: dict[Path, tuple[str, str, list[str]]] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results of an open jaxpr; arguments and results may be `Factored`."""
        return _Scope(self, jaxpr).run(consts, args)

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Count what happens inside ``times`` over."""
        outside, self.repeats = self.repeats, self.repeats * times
        try:
            yield
        finally:
            self.repeats = outside

    def materialize(self, value: Factored, primitive: str, source: str, why: str) -> Any:
        """The weight summed, after the policy has had its say."""
        new = self.note(Event(value.path, primitive, source, why, 2 * value.rank * value.base.size * self.repeats))
        what = f"the adapted weight {value.path!r} of shape {value.shape} is materialized (its update is summed to "
        what += "full size) for "
        place = f"the primitive {primitive!r} at {source}: {why}"
        if self.policy == "error":
            advice = 'Exclude the weight from the targets, or pass materialize="allow".'
            raise MaterializeError(f"{what}{place}. {advice}")
        if self.policy == "warn" and new:
            dropped = " Dropout does not act on it." if value.key is not None else ""
            self.told.setdefault(value.path, (what, dropped, []))[2].append(place)
        return dense(value)

    def next_mask(self, path: str) -> int:
        """The number of a weight's dropout mask, in program order: uses of one weight drop different entries."""
        self.masks[path] += 1
        return self.masks[path] - 1

    def tell(self) -> None:
        """Warn of each materialized weight once, with every place where it was."""
        for what, dropped, places in self.told.values():
            where = f"{places[0]}. " if len(places) == 1 else f"{len(places)} primitives:{bullets(places)}\n"
            hint = 'Results stay exact, at the cost of a full-size sum; pass materialize="allow" to silence this.'
            warnings.warn(what + where + hint + dropped, MaterializeWarning, stacklevel=4)
        self.told.clear()

    def note(self, event: Event) -> bool:
        """Keep an event; whether it is the first of its weight, primitive and source line."""
        new = all(event[:3] != seen[:3] for seen in self.events)
        self.events.append(event)
        return new


class _Scope:
    """One jaxpr under evaluation."""

    def __init__(self, session: Session, jaxpr: Any):
        self.session = session
        self.jaxpr = jaxpr
        self.spread: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def run(self, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        jaxpr = self.jaxpr
        env: dict[Any, Any] = {}
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
        kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            with compat.equation_context(eqn):
                results = self.equation(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
            for v in eqn.invars:
                if isinstance(v, core.Var) and last_use[v] == i and v not in kept:
                    env.pop(v, None)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        if not any(isinstance(v, Factored) for v in values):
            results = compat.bind(eqn, values)
            if eqn.primitive.name == "broadcast_in_dim":
                self.spread[eqn.outvars[0]] = (values[0], eqn.params["broadcast_dimensions"])
            return results
        why = "it has no factored form"
        if eqn.primitive.name not in SQUARES and any(isinstance(v, Factored) and v.squared for v in values):
            values = [self.settle(v, eqn, SQUARED) if isinstance(v, Factored) and v.squared else v for v in values]
            return self.equation(eqn, values)
        if eqn.primitive.name not in REARRANGING:
            values = [self.settle(v, eqn, "") if isinstance(v, Factored) and v.picked else v for v in values]
            if not any(isinstance(v, Factored) for v in values):
                return self.equation(eqn, values)
        if (primitive := PRIMITIVES.get(eqn.primitive.name)) is not None:
            self.session.around.append(eqn)
            try:
                return primitive.rule(self, eqn, list(values))
            except Decline as reason:
                why = str(reason)
            finally:
                self.session.around.pop()
        return compat.bind(eqn, [self.settle(v, eqn, why) for v in values])

    def support(self, atom: Any, value: Any) -> tuple[Any, tuple[int, ...]]:
        """``value`` without the dimensions along which it is known to be constant, and those that remain."""
        value = jnp.asarray(value)
        dims = tuple(range(value.ndim))
        if not isinstance(atom, core.Literal) and atom in self.spread:
            value, dims = self.spread[atom]
            value = jnp.asarray(value)
        unit = [i for i, size in enumerate(value.shape) if size == 1]
        kept = tuple(d for i, d in enumerate(dims) if i not in unit)
        return (lax.squeeze(value, unit) if unit else value), kept

    def factored(self, weight: Factored, eqn: Any, flops: int) -> None:
        """Note that ``eqn`` consumed ``weight`` in factored form."""
        source = compat.source_line(eqn, self.session.around) if self.session.policy == "explain" else ""
        self.session.note(Event(weight.path, eqn.primitive.name, source, None, flops * self.session.repeats))

    def settle(self, value: Any, eqn: Any, why: str) -> Any:
        """``value`` as a plain array: a factored weight is materialized, as the policy says."""
        if not isinstance(value, Factored):
            return value
        if value.is_row or value.picked:
            self.factored(value, eqn, 2 * value.rank * value.base.size)
            return dense(value)
        return self.session.materialize(value, eqn.primitive.name, compat.source_line(eqn, self.session.around), why)
