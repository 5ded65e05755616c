"""Which values of a program a gradient reaches: a backward pass with a flag in place of each cotangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jlora._src.engine import compat

ZERO_DERIVATIVE = frozenset("stop_gradient floor ceil round sign nextafter is_finite".split())
"""Primitives with floating results whose derivative is zero."""
CALLS = frozenset("jit pjit remat2 checkpoint compute_on shard_map closed_call".split())
CUSTOM_DERIVATIVES = frozenset(("custom_jvp_call", "custom_vjp_call"))


def inexact(atom: Any) -> bool:
    """Whether a variable has a cotangent."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


@dataclasses.dataclass
class Visited:
    """The equations that a backward pass visits.

    Attributes:
      blocked: ids of the equations whose scalar operands the pass does not follow.
      equations: ids of the visited equations, those in inner jaxprs included.
    """

    blocked: Collection[int] = ()
    equations: set[int] = dataclasses.field(default_factory=set)

    def blocks(self, atom: Any, eqn: Any) -> bool:
        return id(eqn) in self.blocked and atom.aval.size == 1


def reached_variables(jaxpr: Any, live: Sequence[bool], visited: Visited | None = None) -> set[Any]:
    """The variables of an open jaxpr that a gradient entering at the ``live`` results reaches."""
    reached = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and _differentiable(v)}
    for eqn in reversed(jaxpr.eqns):
        results = [v in reached or bool(eqn.effects) for v in eqn.outvars]
        if any(results):
            operands = list(zip(eqn.invars, _reached_operands(eqn, results, visited), strict=True))
            if visited is not None:
                visited.equations.add(id(eqn))
                operands = [(v, on and not visited.blocks(v, eqn)) for v, on in operands]
            reached |= {v for v, on in operands if on and _differentiable(v)}
    return reached


def live_inner_results(eqn: Any, live: Sequence[bool], visited: Visited | None = None) -> list[bool]:
    """The results at which a gradient enters the jaxprs inside an equation, given its ``live`` results."""
    live = list(live)
    if eqn.primitive.name not in ("scan", "while"):
        return live
    n_consts, n_carry, body = loop_body(eqn)
    jaxpr, _ = compat.open_jaxpr(body)
    while True:  # what one iteration needs of the carry, the previous one returns
        reached = reached_variables(jaxpr, live, visited)
        carry = jaxpr.invars[n_consts : n_consts + n_carry]
        grown = [on or v in reached for on, v in zip(live[:n_carry], carry, strict=True)] + live[n_carry:]
        if grown == live:
            return live
        live = grown


def loop_body(eqn: Any) -> tuple[int, int, Any]:
    """The numbers of a loop body's constants and carried values, and its jaxpr."""
    p = eqn.params
    if eqn.primitive.name == "while":
        return p["body_nconsts"], len(eqn.outvars), p["body_jaxpr"]
    return *compat.scan_split(p), p["jaxpr"]


def _reached_operands(eqn: Any, live: Sequence[bool], visited: Visited | None) -> list[bool]:
    """For each operand of an equation, whether the gradient of its ``live`` results reaches it."""
    name, n = eqn.primitive.name, len(eqn.invars)
    if name in ZERO_DERIVATIVE:
        return [False] * n
    if name in CALLS:
        return _reached_inputs(compat.inner_jaxpr(eqn), live, visited)
    if name == "cond":
        branches = [_reached_inputs(branch, live, visited) for branch in eqn.params["branches"]]
        return [False, *map(any, zip(*branches, strict=True))]
    if name in ("scan", "while"):
        _, _, body = loop_body(eqn)
        inputs = _reached_inputs(body, live_inner_results(eqn, live, visited), visited)
        return [*[False] * (n - len(inputs)), *inputs]  # the condition of a while loop has no gradient
    if name in CUSTOM_DERIVATIVES:  # assumed to use every operand
        _reached_inputs(eqn.params["call_jaxpr"], live, visited)
    return [True] * n


def _reached_inputs(closed: Any, live: Sequence[bool], visited: Visited | None) -> list[bool]:
    jaxpr, _ = compat.open_jaxpr(closed)
    reached = reached_variables(jaxpr, live, visited)
    return [v in reached for v in jaxpr.invars]


def _differentiable(atom: Any) -> bool:
    return isinstance(atom, core.Var) and inexact(atom)
