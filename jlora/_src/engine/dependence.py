"""What the values of a program depend on, read off its jaxpr before it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jax.extend import core

from jlora._src.engine import compat
from jlora._src.engine.gradient import CALLS, FLAT, OWN_RULES, Seen, loop, reached

Note: TypeAlias = Callable[[Any, Sequence[bool]], None]
"""Called with each equation, and whether each of its operands depends on what is asked about."""


def constant_gathers(jaxpr: Any) -> set[int]:
    """The ids of the gather equations in an open jaxpr, and in those inside it, whose indices depend on no argument.

    They pick the same entries whatever the program is given: they rearrange a weight.
    """
    found: dict[int, bool] = {}

    def note(eqn: Any, operands: Sequence[bool]) -> None:
        if eqn.primitive.name == "gather":  # an equation of a shared jaxpr must be constant in all calls
            found[id(eqn)] = found.get(id(eqn), True) and not operands[1]

    _visit(jaxpr, [True] * len(jaxpr.invars), note, frozenset())
    return {eqn for eqn, constant in found.items() if constant}


def learned_factors(jaxpr: Any, trained: Sequence[bool]) -> set[tuple[int, int]]:
    """The operands of products entry by entry, ``(id of the equation, position)``, through which a gradient reaches
    one of the ``trained`` arguments of an open jaxpr: the norm of an adapted weight, or a gain that is trained."""
    found: set[tuple[int, int]] = set()

    def note(eqn: Any, operands: Sequence[bool]) -> None:
        if eqn.primitive.name in ("mul", "div"):
            found.update((id(eqn), i) for i, on in enumerate(operands) if on)

    _visit(jaxpr, trained, note, FLAT)
    return found


def auxiliary(jaxpr: Any, live: Sequence[bool], parameters: Sequence[bool]) -> set[int]:
    """The ids of the equations whose results reach the ``live`` ones only by a scalar that one of the ``parameters`` is
    multiplied or divided by, as does the estimate of its norm. One that no gradient reaches is none of them."""
    scales = _scaled(jaxpr, parameters)
    every, direct = Seen(), Seen(scales)
    if scales:
        reached(jaxpr, live, every)
        reached(jaxpr, live, direct)
    return every.ids - direct.ids


def _scaled(jaxpr: Any, parameters: Sequence[bool]) -> set[int]:
    """The ids of products of what is made of parameters alone with what depends on other arguments too."""
    found: list[dict[int, list[bool]]] = []
    for given in (parameters, [not on for on in parameters]):
        operands_of: dict[int, list[bool]] = {}

        def note(eqn: Any, operands: Sequence[bool], found: dict[int, list[bool]] = operands_of) -> None:
            if eqn.primitive.name in ("mul", "div"):
                found[id(eqn)] = [a or b for a, b in zip(operands, found.get(id(eqn), (False, False)), strict=True)]

        _visit(jaxpr, given, note, frozenset())
        found.append(operands_of)
    own, other = found
    return {eqn for eqn in own if any(own[eqn][i] and not other[eqn][i] and other[eqn][1 - i] for i in range(2))}


def _visit(jaxpr: Any, given: Sequence[bool], note: Note, flat: frozenset[str]) -> list[bool]:
    """Which results depend on the ``given`` arguments; primitives in ``flat`` hand nothing on."""
    depends = {v for v, on in zip(jaxpr.invars, given, strict=True) if on}
    for eqn in jaxpr.eqns:
        operands = [isinstance(v, core.Var) and v in depends for v in eqn.invars]
        note(eqn, operands)
        results = [False] * len(eqn.outvars) if eqn.primitive.name in flat else _inside(eqn, operands, note, flat)
        depends |= {v for v, on in zip(eqn.outvars, results, strict=True) if on}
    return [isinstance(v, core.Var) and v in depends for v in jaxpr.outvars]


def _inside(eqn: Any, operands: list[bool], note: Note, flat: frozenset[str]) -> list[bool]:
    name, plain = eqn.primitive.name, [any(operands) or bool(eqn.effects)] * len(eqn.outvars)
    if name in CALLS | OWN_RULES:
        jaxpr, _ = compat.open_jaxpr(compat.call_of(eqn))
        return _visit(jaxpr, operands, note, flat)
    if name == "cond":
        for branch in eqn.params["branches"]:
            _visit(compat.open_jaxpr(branch)[0], operands[1:], note, flat)
    elif name in ("scan", "while"):
        n_consts, n_carry, closed = loop(eqn)
        jaxpr, _ = compat.open_jaxpr(closed)
        inner = operands[len(operands) - len(jaxpr.invars) :]
        carried = slice(n_consts, n_consts + n_carry)
        if any(inner):  # what one iteration carries on, the next is given
            inner[carried] = [True] * n_carry
        _visit(jaxpr, inner, note, flat)
    return plain
