"""Which gathers of a program pick the same entries whatever it is given: those rearrange a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jlora import _compat
from jlora._gradient import CALLS, loop


def constant_gathers(jaxpr: Any) -> set[int]:
    """The ids of the gather equations in an open jaxpr, and in those inside it, whose indices depend on no argument."""
    found: dict[int, bool] = {}
    _visit(jaxpr, [True] * len(jaxpr.invars), found)
    return {eqn for eqn, constant in found.items() if constant}


def _visit(jaxpr: Any, given: Sequence[bool], found: dict[int, bool]) -> list[bool]:
    """Which results depend on an argument, given which arguments do."""
    depends = {v for v, on in zip(jaxpr.invars, given, strict=True) if on}
    for eqn in jaxpr.eqns:
        operands = [isinstance(v, core.Var) and v in depends for v in eqn.invars]
        if eqn.primitive.name == "gather":  # an equation of a shared jaxpr must be constant in all calls
            found[id(eqn)] = found.get(id(eqn), True) and not operands[1]
        results = _inside(eqn, operands, found)
        depends |= {v for v, on in zip(eqn.outvars, results, strict=True) if on}
    return [isinstance(v, core.Var) and v in depends for v in jaxpr.outvars]


def _inside(eqn: Any, operands: list[bool], found: dict[int, bool]) -> list[bool]:
    name, plain = eqn.primitive.name, [any(operands) or bool(eqn.effects)] * len(eqn.outvars)
    if name in CALLS or name in ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"):
        jaxpr, _ = _compat.open_jaxpr(_compat.call_of(eqn))
        return _visit(jaxpr, operands, found)
    if name == "cond":
        for branch in eqn.params["branches"]:
            _visit(_compat.open_jaxpr(branch)[0], operands[1:], found)
    elif name in ("scan", "while"):
        n_consts, n_carry, closed = loop(eqn)
        jaxpr, _ = _compat.open_jaxpr(closed)
        inner = operands[len(operands) - len(jaxpr.invars) :]
        carried = slice(n_consts, n_consts + n_carry)
        if any(inner):  # what one iteration carries on, the next is given
            inner[carried] = [True] * n_carry
        _visit(jaxpr, inner, found)
    return plain
