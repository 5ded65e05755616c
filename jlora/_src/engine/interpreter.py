"""The interpreter: evaluate a jaxpr in which some values are factored weights.

Read the operands; if none is factored, bind the equation unchanged; else look up its rule; if there is none, or it
declines, apply the materialize policy. The rules are in `rules.table`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import Factored, materialize
from jlora._src.engine.factors.named_axes import NamedArray
from jlora._src.engine.factors.stored import Stored, dequantized
from jlora._src.engine.location import Location
from jlora._src.engine.observation import Mode
from jlora._src.engine.rules.rule import Decline
from jlora._src.engine.rules.table import KEEPS_STORED, PRIMITIVES, REARRANGING, SQUARED, SQUARES
from jlora._src.types import Path
from jlora.messages import bullets

Policy = Literal["warn", "error", "allow", "explain"]


class MaterializeWarning(UserWarning):
    """An adapted weight was materialized because a primitive has no factored form."""


class MaterializeError(TypeError):
    """Raised in place of `MaterializeWarning` under ``materialize="error"``."""


class Event(NamedTuple):
    """One consumption of an adapted weight.

    Attributes:
      path: the weight's; comma-separated if the model joined several weights.
      primitive, source: the consumer, and its source line.
      why: why it was materialized; None if it stayed factored.
      flops: FLOPs that the update adds to the forward pass.
      scheme: of a quantized base; "" for any other.
    """

    path: str
    primitive: str
    source: str
    why: str | None
    flops: int
    scheme: str = ""


class PendingWarning(NamedTuple):
    """The warning due at the end of a call for one materialized weight."""

    what: str
    dropout: str
    places: list[str]


@dataclasses.dataclass
class Session:
    """The state of one call of a wrapped function: its policy and its record so far.

    Attributes:
      policy: what to do when a weight must be materialized.
      inline_custom_rules: whether to inline functions with custom derivative rules.
      constant_gathers: ids of the gather equations that pick the same entries at every call.
      trained_operands: ``(id of a product, position)`` of the operands that a trained value passes through.
      location: the current place in the program.
      events: every consumption so far.
      masks: the number of dropout masks drawn for each weight.
      pending: the warnings to emit at the end of the call.
      observation: what products record of their inputs in place of computing updates (`observation`); None to compute.
    """

    policy: Policy
    inline_custom_rules: bool
    constant_gathers: set[int] = dataclasses.field(default_factory=set)
    trained_operands: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    location: Location = dataclasses.field(default_factory=Location)
    events: list[Event] = dataclasses.field(default_factory=list)
    masks: Counter[str] = dataclasses.field(default_factory=Counter)
    pending: dict[Path, PendingWarning] = dataclasses.field(default_factory=dict)
    observation: Mode | None = None

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results of an open jaxpr; arguments and results may be `Factored`."""
        return _Scope(self, jaxpr).run(consts, args)

    def materialize(self, value: Factored, primitive: str, source: str, why: str) -> Any:
        """The weight summed to its full shape, if the policy allows."""
        flops = 2 * value.rank * value.base.size * self.location.repeats
        new = self.record(Event(value.path, primitive, source, why, flops, value.scheme))
        what = f"the adapted weight {value.path!r} of shape {value.shape} is materialized at full size for "
        place = f"the primitive {primitive!r} at {source}: {why}"
        if self.policy == "error":
            advice = 'Exclude the weight from the targets, or pass materialize="allow".'
            raise MaterializeError(f"{what}{place}. {advice}")
        if self.policy == "warn" and new:
            dropout = " It gets no dropout." if value.key is not None else ""
            self.pending.setdefault(value.path, PendingWarning(what, dropout, [])).places.append(place)
        return materialize(value)

    def next_mask(self, path: str) -> int:
        """The index of a weight's next dropout mask, in program order: each use of a weight drops different entries."""
        self.masks[path] += 1
        return self.masks[path] - 1

    def warn(self) -> None:
        """Warn once for each materialized weight, listing every place."""
        for what, dropout, places in self.pending.values():
            where = f"{places[0]}. " if len(places) == 1 else f"{len(places)} primitives:{bullets(places)}\n"
            hint = 'The results are exact, but cost a full-size sum; pass materialize="allow" to silence this.'
            warnings.warn(what + where + hint + dropout, MaterializeWarning, stacklevel=4)
        self.pending.clear()

    def record(self, event: Event) -> bool:
        """Record an event. True if it is the first with its weight, primitive and source line."""
        new = all(event[:3] != seen[:3] for seen in self.events)
        self.events.append(event)
        return new


class _Scope:
    """The evaluation of one jaxpr."""

    def __init__(self, session: Session, jaxpr: Any):
        self.session = session
        self.jaxpr = jaxpr
        self.broadcasts: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def run(self, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        jaxpr = self.jaxpr
        env: dict[Any, Any] = {}
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
        results = {v for v in jaxpr.outvars if isinstance(v, core.Var)}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            with compat.equation_context(eqn):
                env.update(zip(eqn.outvars, self.equation(eqn, values), strict=True))
            for v in eqn.invars:
                if isinstance(v, core.Var) and last_use[v] == i and v not in results:
                    env.pop(v, None)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The results of one equation."""
        values = [self._as_operand(v, eqn) for v in values]
        if not any(isinstance(v, Factored) for v in values):
            results = compat.bind(eqn, values)
            if eqn.primitive.name == "broadcast_in_dim":
                self.broadcasts[eqn.outvars[0]] = (values[0], eqn.params["broadcast_dimensions"])
            return results
        why = "it has no factored form"
        if (primitive := PRIMITIVES.get(eqn.primitive.name)) is not None:
            with self.session.location.inside(eqn):
                try:
                    return primitive.rule(self, eqn, list(values))
                except Decline as reason:
                    why = str(reason)
        return compat.bind(eqn, [self.materialize(v, eqn, why) for v in values])

    def _as_operand(self, value: Any, eqn: Any) -> Any:
        """``value`` as ``eqn`` accepts it: squares and rows picked by constants stay factored for some primitives."""
        if isinstance(value, Factored) and isinstance(value.base, Stored) and eqn.primitive.name not in KEEPS_STORED:
            value = materialize(value) if value.is_frozen else dataclasses.replace(value, base=dequantized(value.base))
        if isinstance(value, Factored) and value.squared and eqn.primitive.name not in SQUARES:
            return self.materialize(value, eqn, SQUARED)
        if isinstance(value, Factored) and value.constant_rows and eqn.primitive.name not in REARRANGING:
            return self.materialize(value, eqn, "")
        return value

    def nonconstant_part(self, atom: Any, value: Any) -> NamedArray:
        """``value`` without the dimensions along which it is known to be constant; the others name its axes."""
        value = jnp.asarray(value)
        dims = tuple(range(value.ndim))
        if not isinstance(atom, core.Literal) and atom in self.broadcasts:
            value, dims = self.broadcasts[atom]
            value = jnp.asarray(value)
        unit = [i for i, size in enumerate(value.shape) if size == 1]
        kept = tuple(d for i, d in enumerate(dims) if i not in unit)
        return NamedArray(lax.squeeze(value, unit) if unit else value, kept)

    def record_factored(self, weight: Factored, eqn: Any, flops: int) -> None:
        """Record that ``eqn`` consumed ``weight`` in factored form."""
        location = self.session.location
        source = location.source_line(eqn) if self.session.policy == "explain" else ""
        self.session.record(
            Event(weight.path, eqn.primitive.name, source, None, flops * location.repeats, weight.scheme)
        )

    def materialize(self, value: Any, eqn: Any, why: str) -> Any:
        """``value`` as a plain array: materializes a factored weight, if the policy allows it."""
        if not isinstance(value, Factored):
            return value
        if value.is_frozen:
            return materialize(value)
        if value.is_row or value.constant_rows:
            self.record_factored(value, eqn, 2 * value.rank * value.base.size)
            return materialize(value)
        return self.session.materialize(value, eqn.primitive.name, self.session.location.source_line(eqn), why)
