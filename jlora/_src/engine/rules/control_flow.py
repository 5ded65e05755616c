"""Control flow and calls that receive a factored weight are emitted again, through JAX's public functions.

A `Factored` is a pytree, so it passes through ``lax.scan``, ``lax.switch``, ``lax.while_loop``, ``jax.jit``,
``jax.checkpoint`` and ``jax.shard_map`` as an argument, and inner jaxprs are interpreted by the same session.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored, folded
from jlora._src.engine.named_axes import RANK, Leg
from jlora._src.engine.rules.products import Decline

LEAVES = "it leaves control flow, changed or not, as a result"


def jit(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A nested ``jit`` under its own name, with its shardings; factored results stay factored."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])

    def call(*args: Any) -> list[Any]:
        return scope.session.run(jaxpr, consts, args)

    call.__name__ = p["name"]
    options = {"inline": p["inline"], "keep_unused": p["keep_unused"]}
    if p["compiler_options_kvs"]:
        options["compiler_options"] = dict(p["compiler_options_kvs"])
    if any(isinstance(s, jax.sharding.Sharding) for s in p["in_shardings"]):
        args = [v.beside(v.base) if isinstance(v, Factored) else v for v in args]
        options["in_shardings"] = tuple(_like(v, s) for v, s in zip(args, p["in_shardings"], strict=True))
    if any(isinstance(s, jax.sharding.Sharding) for s in p["out_shardings"]):
        shapes = jax.eval_shape(call, *args)
        options["out_shardings"] = [_like(v, s) for v, s in zip(shapes, p["out_shardings"], strict=True)]
    return jax.jit(call, **options)(*args)


def _like(value: Any, sharding: Any) -> Any:
    """The sharding for a jit argument: factors follow the weight's, an unspecified one stays so."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    if not isinstance(value, Factored):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return value.with_legs(sharding, lambda leg: Leg(None, leg.dims))

    def named(_: Any, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    return _following(value, sharding.spec, sharding, named)


def _following(value: Factored, spec: Any, base: Any, fn: Callable[[Any, PartitionSpec], Any]) -> Factored:
    """``value`` with another base, and ``fn(array, its spec)`` on every leg: a leg's partition entries are those of
    the dimensions that it follows in the weight's ``spec``; the rank is replicated."""
    entries = tuple(spec) + (None,) * (len(value.shape) - len(spec))

    def follow(leg: Leg) -> Leg:
        own = PartitionSpec(*(None if d == RANK else entries[d] for d in leg.dims))
        return Leg(fn(leg.array, own), leg.dims)

    return value.with_legs(base, follow)


def checkpoint(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.checkpoint`` (``remat``) with its policy."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])
    run = jax.checkpoint(
        lambda *args: scope.session.run(jaxpr, consts, args), prevent_cse=p["prevent_cse"], policy=p["policy"]
    )
    return run(*args)


def compute_on(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """What runs on the host, say, does so with its low-rank product."""
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])
    run = compat.compute_on(lambda *args: _settled(scope, eqn, scope.session.run(jaxpr, consts, args)), eqn.params)
    return run(*args)


def cond(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.cond`` and ``lax.switch``: every branch sees the factored operands."""
    index, *operands = args
    if isinstance(index, Factored):
        raise Decline("an adapted weight is the condition")

    def branch(closed: Any) -> Any:
        jaxpr, consts = compat.open_jaxpr(closed)
        return lambda *xs: _settled(scope, eqn, scope.session.run(jaxpr, consts, xs))

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], *operands)


def while_loop(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.while_loop``; a weight that the loop carries unchanged is a constant of it."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    (cond_jaxpr, cond_own), (body_jaxpr, body_own) = map(compat.open_jaxpr, (p["cond_jaxpr"], p["body_jaxpr"]))
    carry = _Carry(scope, eqn, args[n_cond + n_body :], body_jaxpr.invars[n_body:], body_jaxpr.outvars)

    def going(state: tuple[Any, list[Any]]) -> Any:
        step, moving = state
        values = _at_step(step, [*cond_consts, *carry.whole(moving)])
        return _settled(scope, eqn, scope.session.run(cond_jaxpr, cond_own, values))[0]

    def body(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        step, moving = state
        values = _at_step(step, [*body_consts, *carry.whole(moving)])
        return None if step is None else step + 1, carry.moving(scope.session.run(body_jaxpr, body_own, values))

    first = jnp.int32(0) if any(map(_drops, args)) else None
    return carry.whole(lax.while_loop(going, body, (first, carry.init))[1])


def scan(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``lax.scan``; stacked weights are sliced factored, leg by leg."""
    p = eqn.params
    n_consts, n_carry = compat.scan_split(p)
    jaxpr, own = compat.open_jaxpr(p["jaxpr"])
    consts, xs = args[:n_consts], args[n_consts + n_carry :]
    carry = _Carry(scope, eqn, args[n_consts : n_consts + n_carry], jaxpr.invars[n_consts:], jaxpr.outvars[:n_carry])
    sliced = [_leading(x) if isinstance(x, Factored) else x for x in xs]

    def body(moving: list[Any], step_and_slices: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        step, slices = step_and_slices
        values = [_one(x, s) if isinstance(x, Factored) else s for x, s in zip(xs, slices, strict=True)]
        out = scope.session.run(jaxpr, own, _at_step(step, [*consts, *carry.whole(moving), *values]))
        return carry.moving(out[:n_carry]), out[n_carry:]

    steps = jnp.arange(p["length"]) if any(map(_drops, args)) else None
    with scope.session.repeated(p["length"]):
        final, ys = lax.scan(body, carry.init, (steps, sliced), p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry.whole(final), *map(_restacked, ys)]


class _Carry:
    """A loop's carried values: factored weights carried unchanged are held fixed, the rest moves."""

    def __init__(self, scope: Any, eqn: Any, init: list[Any], invars: Any, outvars: Any):
        self.scope, self.eqn, self.given = scope, eqn, init
        self.fixed = [
            isinstance(v, Factored) and before is after for v, before, after in zip(init, invars, outvars, strict=False)
        ]
        self.init = self.moving(init)

    def moving(self, values: list[Any]) -> list[Any]:
        kept = [v for v, fixed in zip(values, self.fixed, strict=True) if not fixed]
        return _settled(self.scope, self.eqn, kept)

    def whole(self, moving: list[Any]) -> list[Any]:
        rest = iter(moving)
        return [v if fixed else next(rest) for v, fixed in zip(self.given, self.fixed, strict=True)]


def _drops(value: Any) -> bool:
    return isinstance(value, Factored) and value.key is not None


def _at_step(step: Any, values: list[Any]) -> list[Any]:
    """What a loop's body gets at one of its steps: weights that drop entries drop others at every step."""
    return [dataclasses.replace(v, key=Leg(folded(v.key.array, step), v.key.dims)) if _drops(v) else v for v in values]


def _leading(weight: Factored) -> dict[str, Any]:
    """What a scan slices of a stacked weight: the base, and the legs that follow its first dimension."""
    legs = {n: leg for n in ("a", "b", "gain", "key") if (leg := getattr(weight, n)) is not None}
    moved = {n: leg.ordered([0, *(d for d in leg.dims if d != 0)]) for n, leg in legs.items() if 0 in leg.dims}
    return {"base": weight.base, **moved}


def _one(weight: Factored, parts: dict[str, Any]) -> Factored:
    """One slice of a stacked weight, from a slice of each of its `_leading` parts."""

    def sliced(name: str) -> Leg | None:
        leg = getattr(weight, name)
        if leg is None:
            return None
        dims = tuple(d if d == RANK else d - 1 for d in leg.dims if d != 0)
        return Leg(parts[name], dims) if name in parts else Leg(leg.array, dims)

    return dataclasses.replace(weight, base=parts["base"], **{n: sliced(n) for n in ("a", "b", "gain", "key")})


def _restacked(value: Any) -> Any:
    """A result of a scan; where each step hands on its slice of a weight, they are a stacked weight again."""
    if not isinstance(value, Factored):
        return value
    return value.with_legs(value.base, lambda leg: Leg(leg.array, (0, *(d if d == RANK else d + 1 for d in leg.dims))))


def shard_map(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.shard_map``: the specs of the factors are derived from the weight's."""
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])

    def specs(value: Any, spec: Any) -> Any:
        return _following(value, spec, spec, lambda _, own: own) if isinstance(value, Factored) else spec

    def placed(value: Any, spec: Any) -> Any:
        return _following(value, spec, value.base, compat.reshard) if isinstance(value, Factored) else value

    mapped = jax.shard_map(
        lambda *args: tuple(_settled(scope, eqn, scope.session.run(jaxpr, consts, args))),
        mesh=p["mesh"],
        in_specs=tuple(specs(v, s) for v, s in zip(args, p["in_specs"], strict=True)),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(mapped(*map(placed, args, p["in_specs"])))


def custom_rule(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``custom_jvp``, ``custom_vjp`` and ``custom_vmap`` keep their rule and get the weight whole, unless inlined."""
    if not scope.session.inline_custom_rules:
        raise Decline(own_rule(eqn))
    jaxpr, consts = compat.open_jaxpr(compat.call_of(eqn))
    return scope.session.run(jaxpr, consts, args)


def own_rule(eqn: Any) -> str:
    kind = "batching" if eqn.primitive.name == "custom_vmap_call" else "derivative"
    return f"it has its own {kind} rule, which is kept (inline_custom_rules=True looks inside)"


def vary(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``pvary`` and its like, inside ``shard_map``: every part of the weight varies as the base does."""
    (weight,) = args

    def cast(x: Any) -> Any:
        axes = tuple(sorted(set(eqn.params["axes"]) - compat.varying(x)))
        return lax.pcast(x, axes, to="varying") if axes else x

    return [jax.tree.map(cast, weight)]


def reshard(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.sharding.reshard``: the factors follow the weight."""
    (weight,) = args
    (base,) = compat.bind(eqn, [weight.base])
    to = eqn.params["dst_sharding"]

    def move(array: Any, spec: PartitionSpec) -> Any:
        return compat.bind(eqn, [array], dst_sharding=NamedSharding(to.mesh, spec))[0]

    return [_following(weight, to.spec, base, move)]


def device_put(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Weights that are fetched from the host's memory, or laid elsewhere: legs follow that do not lie there already."""
    bases = compat.bind(eqn, [v.base if isinstance(v, Factored) else v for v in args])

    def moved(value: Factored, base: Any, to: Any) -> Factored:
        if isinstance(to, Format):
            to = to.sharding  # a layout is the base's own
        if isinstance(to, NamedSharding):
            sharding = functools.partial(NamedSharding, to.mesh, memory_kind=to.memory_kind)
            return _following(value, to.spec, base, lambda array, spec: compat.put(array, sharding(spec)))
        if isinstance(to, jax.sharding.Sharding | jax.Device):
            return value.with_legs(base, lambda leg: Leg(compat.put(leg.array, to), leg.dims))
        return dataclasses.replace(value, base=base).beside(base)

    moves = zip(args, bases, eqn.params["devices"], strict=True)
    return [moved(v, base, to) if isinstance(v, Factored) else base for v, base, to in moves]


def all_gather(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A weight sharded over devices and gathered where it is used: so are the legs that follow the gathered axis."""
    (weight,) = args
    if not eqn.params["tiled"]:
        raise Decline("it is gathered along a new axis (lax.all_gather with tiled=True has a factored form)")
    (base,) = compat.bind(eqn, [weight.base])

    def gather(array: Any, axis: int) -> Any:
        return compat.bind(eqn, [array], all_gather_dimension=axis)[0]

    return [weight.with_legs(base, lambda leg: leg.along(eqn.params["all_gather_dimension"], gather))]


def _settled(scope: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """Values that leave control flow: a factored one is materialized."""
    return [scope.settle(v, eqn, LEAVES) for v in values]
