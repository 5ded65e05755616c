"""Which values of a program a gradient reaches: the backward pass with a flag in the place of each cotangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jlora._src.engine import compat

FLAT = frozenset("stop_gradient floor ceil round sign nextafter is_finite".split())
"""Primitives of floating results whose derivative is zero."""
CALLS = frozenset("jit pjit remat2 checkpoint compute_on shard_map closed_call".split())
OWN_RULES = frozenset(("custom_jvp_call", "custom_vjp_call"))


def inexact(atom: Any) -> bool:
    """Whether a variable has a cotangent at all."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


@dataclasses.dataclass
class Seen:
    """The equations that a backward pass came by.

    Attributes:
      scales: ids of equations through whose scalar operands it does not go.
      ids: of the equations that it came by, those inside others too.
    """

    scales: Collection[int] = ()
    ids: set[int] = dataclasses.field(default_factory=set)

    def ends(self, atom: Any, eqn: Any) -> bool:
        return id(eqn) in self.scales and atom.aval.size == 1


def reached(jaxpr: Any, live: Sequence[bool], seen: Seen | None = None) -> set[Any]:
    """The variables of an open jaxpr that a gradient reaches which enters by its ``live`` results."""
    found = {v for v, on in zip(jaxpr.outvars, live, strict=True) if on and _differentiable(v)}
    for eqn in reversed(jaxpr.eqns):
        results = [v in found or bool(eqn.effects) for v in eqn.outvars]
        if any(results):
            operands = list(zip(eqn.invars, _operands(eqn, results, seen), strict=True))
            if seen is not None:
                seen.ids.add(id(eqn))
                operands = [(v, on and not seen.ends(v, eqn)) for v, on in operands]
            found |= {v for v, on in operands if on and _differentiable(v)}
    return found


def inside(eqn: Any, live: Sequence[bool], seen: Seen | None = None) -> list[bool]:
    """Which results of the jaxprs inside a control flow equation a gradient enters by, given the equation's."""
    name = eqn.primitive.name
    if name not in ("scan", "while"):
        return list(live)
    live = list(live)
    n_consts, n_carry, closed = loop(eqn)
    jaxpr, _ = compat.open_jaxpr(closed)
    while True:  # what one iteration needs, the iteration before it hands on
        found = reached(jaxpr, live, seen)
        before = jaxpr.invars[n_consts : n_consts + n_carry]
        grown = [on or v in found for on, v in zip(live[:n_carry], before, strict=True)] + live[n_carry:]
        if grown == live:
            return live
        live = grown


def _operands(eqn: Any, live: Sequence[bool], seen: Seen | None) -> list[bool]:
    """For each operand of an equation, whether the gradient of its ``live`` results reaches it."""
    name, n = eqn.primitive.name, len(eqn.invars)
    if name in FLAT:
        return [False] * n
    if name in CALLS:
        return _of_inner(compat.call_of(eqn), live, seen)
    if name == "cond":
        branches = [_of_inner(branch, live, seen) for branch in eqn.params["branches"]]
        return [False, *map(any, zip(*branches, strict=True))]
    if name in ("scan", "while"):
        _, _, closed = loop(eqn)
        of_body = _of_inner(closed, inside(eqn, live, seen), seen)
        return [*[False] * (n - len(of_body)), *of_body]  # a while loop's condition has no gradient
    if name in OWN_RULES:  # taken to use all of its operands
        _of_inner(eqn.params["call_jaxpr"], live, seen)
    return [True] * n


def _of_inner(closed: Any, live: Sequence[bool], seen: Seen | None) -> list[bool]:
    jaxpr, _ = compat.open_jaxpr(closed)
    found = reached(jaxpr, live, seen)
    return [v in found for v in jaxpr.invars]


def loop(eqn: Any) -> tuple[int, int, Any]:
    """Of a loop's body: how many constants it has, how many carried values, and its jaxpr."""
    p = eqn.params
    if eqn.primitive.name == "while":
        return p["body_nconsts"], len(eqn.outvars), p["body_jaxpr"]
    return *compat.scan_split(p), p["jaxpr"]


def _differentiable(atom: Any) -> bool:
    return isinstance(atom, core.Var) and inexact(atom)
