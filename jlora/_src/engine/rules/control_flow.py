"""Control flow and calls with factored operands, emitted through JAX's public functions.

A `Factored` is a pytree, so ``lax.scan``, ``lax.switch``, ``lax.while_loop``, ``jax.jit``, ``jax.checkpoint`` and
``jax.shard_map`` take it as an argument, and the same session interprets their inner jaxprs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.adapted_product import as_equations, checkpoint_policy
from jlora._src.engine.factors.factored import Factored, fold_in
from jlora._src.engine.factors.named_axes import RANK, NamedArray
from jlora._src.engine.factors.stored import divisible, sliceable, specs_of
from jlora._src.engine.rules.placement import map_with_specs, sharding_like
from jlora._src.engine.rules.rule import Decline
from jlora._src.engine.traced_weights import (
    Value,
    combined_kind,
    is_data,
    mark_materialized,
    move_dims,
    stack_slices,
    union,
    weights_in,
)

RETURNED = "it leaves control flow as a result, changed or not"
OWN_DERIVATIVE = "the function's own derivative"
"""A `checkpoint_name` for functions whose custom derivative is their own in a cheaper form: `lora` looks inside."""

# Calls


def jit(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A nested ``jit``, with its name and shardings; factored results stay factored."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])

    def call(*args: Any) -> list[Any]:
        return scope.session.run(jaxpr, consts, args)

    call.__name__ = p["name"]
    options = {"inline": p["inline"], "keep_unused": p["keep_unused"]}
    if p["compiler_options_kvs"]:
        options["compiler_options"] = dict(p["compiler_options_kvs"])
    if any(isinstance(s, jax.sharding.Sharding) for s in p["in_shardings"]):
        args = [v.to_memory_of(v.base) if isinstance(v, Factored) else v for v in args]
        options["in_shardings"] = tuple(map(sharding_like, args, p["in_shardings"]))
    if any(isinstance(s, jax.sharding.Sharding) for s in p["out_shardings"]):
        shapes = jax.eval_shape(call, *args)
        options["out_shardings"] = list(map(sharding_like, shapes, p["out_shardings"]))
    return jax.jit(call, **options)(*args)


def checkpoint(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.checkpoint`` (``remat``) with its policy for the adapted model."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])
    run = jax.checkpoint(
        lambda *args: scope.session.run(jaxpr, consts, args),
        prevent_cse=p["prevent_cse"],
        policy=checkpoint_policy(p["policy"]),
    )
    return run(*args)


def adapted_product(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A product with a weight that an inner `lora` adapted already: the updates add up."""
    jaxpr, consts = compat.open_jaxpr(as_equations(eqn))
    return scope.session.run(jaxpr, consts, args)


def label_adapted_product(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.inner(eqn, as_equations(eqn), values)


def label_call(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return walker.inner(eqn, eqn.params["jaxpr"], values)


def compute_on(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``compute_on``: the low-rank product runs where the base's product does, for example on the host."""
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    run = compat.compute_on(lambda *args: _materialized(scope, eqn, scope.session.run(jaxpr, consts, args)), eqn.params)
    return run(*args)


def shard_map(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.shard_map``: the specs of the factors are derived from the weight's."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])

    def specs(value: Any, spec: Any) -> Any:
        if not isinstance(value, Factored):
            return spec
        return map_with_specs(value, spec, specs_of(value.base, spec, p["mesh"]), lambda _, own: own)

    def placed(value: Any, spec: Any) -> Any:
        return map_with_specs(value, spec, value.base, compat.reshard) if isinstance(value, Factored) else value

    def in_blocks(value: Any, spec: Any) -> Any:
        base = divisible(value.base, spec, p["mesh"]) if isinstance(value, Factored) else None
        return value if base is None else dataclasses.replace(value, base=base)

    args = list(map(in_blocks, args, p["in_specs"]))
    mapped = jax.shard_map(
        lambda *args: tuple(_materialized(scope, eqn, scope.session.run(jaxpr, consts, args))),
        mesh=p["mesh"],
        in_specs=tuple(map(specs, args, p["in_specs"])),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(mapped(*map(placed, args, p["in_specs"])))


def label_materialized_call(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A call whose results are plain arrays."""
    return [mark_materialized(v, RETURNED) for v in label_call(walker, eqn, values)]


def custom_rule(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``custom_jvp``, ``custom_vjp`` and ``custom_vmap`` keep their rule and receive the materialized weight, unless
    they are inlined."""
    jaxpr, consts = compat.open_jaxpr(compat.inner_jaxpr(eqn))
    if not scope.session.inline_custom_rules and not _has_own_derivative(jaxpr):
        raise Decline(_own_rule(eqn))
    return scope.session.run(jaxpr, consts, args)


def label_custom_rule(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A function with a custom derivative or batching rule, assumed to use all of its operands."""
    if _has_own_derivative(compat.open_jaxpr(compat.inner_jaxpr(eqn))[0]):
        return walker.inner(eqn, compat.inner_jaxpr(eqn), values)
    inside = [mark_materialized(v, _own_rule(eqn)) for v in values]
    return walker.inner(eqn, compat.inner_jaxpr(eqn), inside, live=walker.live)


def _has_own_derivative(jaxpr: Any) -> bool:
    return any(eqn.primitive.name == "name" and eqn.params["name"] == OWN_DERIVATIVE for eqn in jaxpr.eqns)


def _own_rule(eqn: Any) -> str:
    kind = "batching" if eqn.primitive.name == "custom_vmap_call" else "derivative"
    return f"it has its own {kind} rule, which is kept (inline_custom_rules=True looks inside)"


def _materialized(scope: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """Values that control flow returns, materialized if factored."""
    return [scope.materialize(v, eqn, RETURNED) for v in values]


# Branches


def cond(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.cond`` and ``lax.switch``: every branch gets the factored operands."""
    index, *operands = args
    if isinstance(index, Factored):
        raise Decline("the condition is an adapted weight")

    def branch(closed: Any) -> Any:
        jaxpr, consts = compat.open_jaxpr(closed)
        return lambda *xs: _materialized(scope, eqn, scope.session.run(jaxpr, consts, xs))

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], *operands)


def label_cond(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    results = [walker.inner(eqn, branch, values[1:]) for branch in eqn.params["branches"]]
    return [_label_choice(walker, eqn, choices) for choices in zip(*results, strict=True)]


def _label_choice(walker: Any, eqn: Any, choices: Sequence[Value]) -> Value:
    """The result of one of several branches: a weight, or one of several; next to activations it is consumed."""
    if any(map(is_data, choices)) and any(map(weights_in, choices)):
        return walker.consume(eqn, list(choices), lambda *_: RETURNED)[0]
    found = union(choices)
    return mark_materialized(found, RETURNED) if found else combined_kind(choices)


# Loops


def while_loop(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.while_loop``; a weight carried unchanged becomes a constant."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    (cond_jaxpr, cond_own), (body_jaxpr, body_own) = map(compat.open_jaxpr, (p["cond_jaxpr"], p["body_jaxpr"]))
    carry = _Carry(scope, eqn, args[n_cond + n_body :], body_jaxpr.invars[n_body:], body_jaxpr.outvars)

    def condition(state: tuple[Any, list[Any]]) -> Any:
        step, moving = state
        values = _at_step(step, [*cond_consts, *carry.whole(moving)])
        return _materialized(scope, eqn, scope.session.run(cond_jaxpr, cond_own, values))[0]

    def body(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, moving = state
        values = _at_step(step, [*body_consts, *carry.whole(moving)])
        return None if step is None else step + 1, carry.moving(scope.session.run(body_jaxpr, body_own, values))

    first = jnp.int32(0) if any(map(_has_dropout, args)) else None
    return carry.whole(lax.while_loop(condition, body, (first, carry.init))[1])


def label_while(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body, _ = compat.open_jaxpr(p["body_jaxpr"])
    carry = _label_carry(walker, eqn, values, values[n_cond + n_body :], body.invars[n_body:], body.outvars)
    walker.inner(eqn, p["cond_jaxpr"], [*values[:n_cond], *carry], live=False)
    walker.inner(eqn, p["body_jaxpr"], [*values[n_cond : n_cond + n_body], *carry])
    return carry


def scan(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.scan``; stacked weights are sliced factored, part by part."""
    p = eqn.params
    n_consts, n_carry = compat.scan_split(p)
    jaxpr, own = compat.open_jaxpr(p["jaxpr"])
    consts, xs = args[:n_consts], args[n_consts + n_carry :]
    carry = _Carry(scope, eqn, args[n_consts : n_consts + n_carry], jaxpr.invars[n_consts:], jaxpr.outvars[:n_carry])
    stacked = [_stacked_arrays(x) if isinstance(x, Factored) else x for x in xs]

    def body(moving: list[Any], step_and_slices: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        step, slices = step_and_slices
        values = [_slice(x, s) if isinstance(x, Factored) else s for x, s in zip(xs, slices, strict=True)]
        out = scope.session.run(jaxpr, own, _at_step(step, [*consts, *carry.whole(moving), *values]))
        return carry.moving(out[:n_carry]), out[n_carry:]

    steps = jnp.arange(p["length"]) if any(map(_has_dropout, args)) else None
    with scope.session.location.repeated(p["length"]):
        final, ys = lax.scan(body, carry.init, (steps, stacked), p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry.whole(final), *map(_restack, ys)]


def label_scan(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    n_consts, n_carry = compat.scan_split(eqn.params)
    jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    carried = values[n_consts : n_consts + n_carry]
    carry = _label_carry(walker, eqn, values, carried, jaxpr.invars[n_consts:], jaxpr.outvars)
    stacked = values[n_consts + n_carry :]
    slices = [move_dims(v, lambda dims: dims[1:]) for v in stacked]
    with walker.location.repeated(eqn.params["length"]):
        results = walker.inner(eqn, eqn.params["jaxpr"], [*values[:n_consts], *carry, *slices])
    leading = {weight.path: weight.dims[0] for v in stacked for weight in weights_in(v)}
    return [*carry, *(stack_slices(v, leading) for v in results[n_carry:])]


class _Carry:
    """A loop's carried values: factored weights carried unchanged stay fixed, the rest moves."""

    def __init__(self, scope: Any, eqn: Any, init: list[Any], invars: Any, outvars: Any):
        self.scope, self.eqn, self.given = scope, eqn, init
        self.fixed = [
            isinstance(v, Factored) and before is after for v, before, after in zip(init, invars, outvars, strict=False)
        ]
        self.init = self.moving(init)

    def moving(self, values: list[Any]) -> list[Any]:
        moving = [v for v, fixed in zip(values, self.fixed, strict=True) if not fixed]
        return _materialized(self.scope, self.eqn, moving)

    def whole(self, moving: list[Any]) -> list[Any]:
        rest = iter(moving)
        return [v if fixed else next(rest) for v, fixed in zip(self.given, self.fixed, strict=True)]


def _label_carry(walker: Any, eqn: Any, values: list[Value], init: list[Value], before: Any, after: Any) -> list[Value]:
    """A loop's carried values: a weight that every iteration returns unchanged is still that weight."""
    carry: list[Value] = []
    for value, invar, outvar in zip(init, before, after, strict=False):
        if invar is not outvar:
            walker.consume(eqn, [value], lambda *_: RETURNED)
        carry.append(value if invar is outvar else combined_kind(values))
    return carry


def _has_dropout(value: Any) -> bool:
    return isinstance(value, Factored) and value.key is not None


def _at_step(step: Any, values: list[Any]) -> list[Any]:
    """The inputs of a loop's body at one step: each step has its own dropout mask."""
    return [
        dataclasses.replace(v, key=v.key.apply(lambda keys: fold_in(keys, step))) if _has_dropout(v) else v
        for v in values
    ]


def _stacked_arrays(weight: Factored) -> dict[str, Any]:
    """The arrays of a stacked weight that a scan slices: the base, and the parts with its first dimension."""
    stacked = {name: part for name, part in weight.parts.items() if 0 in part.dims}
    arrays = {n: part.transpose([0, *(d for d in part.dims if d != 0)]) for n, part in stacked.items()}
    return {"base": sliceable(weight.base), **arrays}


def _slice(weight: Factored, arrays: dict[str, Any]) -> Factored:
    """One slice of a stacked weight, from a slice of each of its `_stacked_arrays`."""

    def sliced(name: str, part: NamedArray) -> NamedArray:
        dims = tuple(d if d == RANK else d - 1 for d in part.dims if d != 0)
        return NamedArray(arrays.get(name, part.array), dims)

    return dataclasses.replace(
        weight, base=arrays["base"], **{name: sliced(name, part) for name, part in weight.parts.items()}
    )


def _restack(value: Any) -> Any:
    """A result of a scan; if each step returns its slice of a weight, a stacked weight again."""
    if not isinstance(value, Factored):
        return value

    def restacked(part: NamedArray) -> NamedArray:
        return NamedArray(part.array, (0, *(d if d == RANK else d + 1 for d in part.dims)))

    return value.map_parts(value.base, restacked)
