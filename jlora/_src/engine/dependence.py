"""What each value of a program depends on, read off the jaxpr before evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from jlora._src.engine import compat
from jlora._src.engine.gradient import (
    CALLS,
    CUSTOM_DERIVATIVES,
    ZERO_DERIVATIVE,
    Visited,
    loop_body,
    reached_variables,
)

Visit: TypeAlias = Callable[[Any, Sequence[bool]], None]
"""Called with each equation and a flag per operand: whether it depends on the given arguments."""


def live_inputs(jaxpr: Any) -> list[bool]:
    """For each input of an open jaxpr, whether some result or effect depends on it."""
    return list(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


def forwarded_inputs(jaxpr: Any) -> list[int | None]:
    """For each result of an open jaxpr, the input that it returns unchanged, also through any jit, remat or scan."""
    origin: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in ("jit", "pjit", "remat2", "checkpoint", "scan"):
            continue
        inner, _ = compat.open_jaxpr(eqn.params["jaxpr"])
        consts, carried = compat.scan_split(eqn.params) if eqn.primitive.name == "scan" else (0, 0)
        for i, (out, source) in enumerate(zip(eqn.outvars, forwarded_inputs(inner), strict=True)):
            if source is None or not isinstance(eqn.invars[source], core.Var) or eqn.invars[source] not in origin:
                continue
            # A scan carries it unchanged, or slices and restacks it.
            if eqn.primitive.name != "scan" or (source - consts == i if i < carried else source >= consts + carried):
                origin[out] = origin[eqn.invars[source]]
    return [origin.get(v) if isinstance(v, core.Var) else None for v in jaxpr.outvars]


def constant_gathers(jaxpr: Any) -> set[int]:
    """The ids of the gather equations in an open jaxpr, inner jaxprs included, whose indices depend on no argument.

    They pick the same entries at every call, which only rearranges a weight.
    """
    constant: dict[int, bool] = {}

    def visit(eqn: Any, operands: Sequence[bool]) -> None:
        if eqn.primitive.name == "gather":  # an equation of a shared jaxpr must be constant in all calls
            constant[id(eqn)] = constant.get(id(eqn), True) and not operands[1]

    _propagate(jaxpr, [True] * len(jaxpr.invars), visit)
    return {eqn for eqn, on in constant.items() if on}


def trained_operands(jaxpr: Any, trained: Sequence[bool]) -> set[tuple[int, int]]:
    """The operands of elementwise products, as ``(id of the equation, position)``, through which a gradient reaches a
    ``trained`` argument of an open jaxpr: the norm of an adapted weight, or a trained scale."""
    found: set[tuple[int, int]] = set()

    def visit(eqn: Any, operands: Sequence[bool]) -> None:
        if eqn.primitive.name in ("mul", "div"):
            found.update((id(eqn), i) for i, on in enumerate(operands) if on)

    _propagate(jaxpr, trained, visit, ZERO_DERIVATIVE)
    return found


def auxiliary_equations(jaxpr: Any, live: Sequence[bool], parameters: Sequence[bool]) -> set[int]:
    """The ids of the equations whose results reach the ``live`` results only through a scalar that multiplies or
    divides one of the ``parameters``, as an estimate of its norm does. Equations without a gradient are not listed."""
    products = _products_of_parameters(jaxpr, parameters)
    every, direct = Visited(), Visited(products)
    if products:
        reached_variables(jaxpr, live, every)
        reached_variables(jaxpr, live, direct)
    return every.equations - direct.equations


def _products_of_parameters(jaxpr: Any, parameters: Sequence[bool]) -> set[int]:
    """The ids of products between a value of parameters alone and one that depends on other arguments too."""

    def operands_by_equation(given: Sequence[bool]) -> dict[int, list[bool]]:
        found: dict[int, list[bool]] = {}

        def visit(eqn: Any, operands: Sequence[bool]) -> None:
            if eqn.primitive.name in ("mul", "div"):
                found[id(eqn)] = [a or b for a, b in zip(operands, found.get(id(eqn), (False, False)), strict=True)]

        _propagate(jaxpr, given, visit)
        return found

    own, other = operands_by_equation(parameters), operands_by_equation([not on for on in parameters])
    return {eqn for eqn in own if any(own[eqn][i] and not other[eqn][i] and other[eqn][1 - i] for i in range(2))}


def _propagate(jaxpr: Any, given: Sequence[bool], visit: Visit, stops: Collection[str] = ()) -> list[bool]:
    """Which results depend on the ``given`` arguments; nothing depends on them through the primitives in ``stops``."""
    depends = {v for v, on in zip(jaxpr.invars, given, strict=True) if on}
    for eqn in jaxpr.eqns:
        operands = [isinstance(v, core.Var) and v in depends for v in eqn.invars]
        visit(eqn, operands)
        stopped = eqn.primitive.name in stops
        results = [False] * len(eqn.outvars) if stopped else _propagate_inside(eqn, operands, visit, stops)
        depends |= {v for v, on in zip(eqn.outvars, results, strict=True) if on}
    return [isinstance(v, core.Var) and v in depends for v in jaxpr.outvars]


def _propagate_inside(eqn: Any, operands: list[bool], visit: Visit, stops: Collection[str]) -> list[bool]:
    name = eqn.primitive.name
    if name in CALLS | CUSTOM_DERIVATIVES:
        jaxpr, _ = compat.open_jaxpr(compat.inner_jaxpr(eqn))
        return _propagate(jaxpr, operands, visit, stops)
    if name == "cond":
        for branch in eqn.params["branches"]:
            _propagate(compat.open_jaxpr(branch)[0], operands[1:], visit, stops)
    elif name in ("scan", "while"):
        n_consts, n_carry, body = loop_body(eqn)
        jaxpr, _ = compat.open_jaxpr(body)
        inner = operands[len(operands) - len(jaxpr.invars) :]
        if any(inner):  # later iterations receive what earlier ones carry
            inner[n_consts : n_consts + n_carry] = [True] * n_carry
        _propagate(jaxpr, inner, visit, stops)
    return [any(operands) or bool(eqn.effects)] * len(eqn.outvars)
