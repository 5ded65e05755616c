"""What the rules of all primitives share.

A rule takes ``(scope, eqn, args)``, where some of ``args`` are `Factored`, and returns the equation's results; where
it has no factored form for its case it raises `Decline`, and the interpreter applies the materialize policy. A label
takes ``(walker, eqn, values)``, where some of ``values`` are traced weights, and returns the values of the equation.
The two stand side by side: what a rule declines, its label says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored
from jlora._src.engine.traced_weights import Value

Rule: TypeAlias = Callable[[Any, Any, list[Any]], list[Any]]
Label: TypeAlias = Callable[[Any, Any, list[Value]], list[Value]]


class Decline(Exception):  # noqa: N818 (not an error: it asks for the materialize policy)
    """A rule has no factored form for this case; the text says why."""


def bind_base(eqn: Any, args: list[Any]) -> list[Any]:
    """The equation's results for the bases of the weights among ``args``."""
    return compat.bind(eqn, [v.base if isinstance(v, Factored) else v for v in args])


def label_unchanged(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """As many results as operands, each of them unchanged."""
    return values


def label_first(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Every result has the dimensions of the first operand."""
    return walker.consume(eqn, values) if isinstance(values[0], str) else [values[0]] * len(eqn.outvars)
