"""Shared by the rules of all primitives.

A rule takes ``(scope, eqn, args)``, where some of ``args`` are `Factored`, and returns the equation's results. If it
has no factored form for a case, it raises `Decline`, and the interpreter applies the materialize policy. A label takes
``(walker, eqn, values)``, where some of ``values`` are traced weights, and returns the values of the equation's
results. Rule and label stand side by side: whatever the rule declines, the label reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.stored import Stored, bind_stored
from jlora._src.engine.traced_weights import Value

Rule: TypeAlias = Callable[[Any, Any, list[Any]], list[Any]]
Label: TypeAlias = Callable[[Any, Any, list[Value]], list[Value]]


class Decline(Exception):  # noqa: N818 (not an error: it asks for the materialize policy)
    """A rule has no factored form for this case; the message is the reason."""


def bind_base(eqn: Any, args: list[Any]) -> list[Any]:
    """The equation's results for the bases of the weights among ``args``; see `KEEPS_STORED` for stored ones."""
    first, *others = [v.base if isinstance(v, Factored) else v for v in args]
    return bind_stored(eqn, first, others) if isinstance(first, Stored) else compat.bind(eqn, [first, *others])


def label_unchanged(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Returns every operand unchanged."""
    return values


def label_first(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Every result has the dimensions of the first operand."""
    return walker.consume(eqn, values) if isinstance(values[0], str) else [values[0]] * len(eqn.outvars)
