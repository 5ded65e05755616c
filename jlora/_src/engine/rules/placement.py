"""The placement of a weight: shardings, devices, memory spaces, and collectives inside ``shard_map``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import RANK, NamedArray
from jlora._src.engine.factors.stored import specs_of
from jlora._src.engine.rules.rule import Decline, bind_base
from jlora._src.engine.traced_weights import Value


def sharding_like(value: Any, sharding: Any) -> Any:
    """The sharding for a jit argument: the parts of a weight follow its own; unspecified stays unspecified."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    if not isinstance(value, Factored):
        return sharding
    if not isinstance(sharding, NamedSharding):
        base = jax.tree.map(lambda _: sharding, value.base)
        return value.map_parts(base, lambda part: NamedArray(None, part.dims))

    def named(_: Any, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    base = jax.tree.map(lambda spec: named(None, spec), specs_of(value.base, sharding.spec, sharding.mesh))
    return map_with_specs(value, sharding.spec, base, named)


def map_with_specs(value: Factored, spec: Any, base: Any, fn: Callable[[Any, PartitionSpec], Any]) -> Factored:
    """``value`` with another base, and ``fn(array, its spec)`` for every part. A part is partitioned along its
    dimensions like the weight's ``spec``; the rank is replicated."""
    entries = tuple(spec) + (None,) * (len(value.shape) - len(spec))

    def follow(part: NamedArray) -> NamedArray:
        own = PartitionSpec(*(None if d == RANK else entries[d] for d in part.dims))
        return part.apply(lambda x: fn(x, own))

    return value.map_parts(base, follow)


def pvary(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``pvary`` and ``pcast``, inside ``shard_map``: every part varies along the base's axes."""
    (weight,) = args

    def cast(x: Any) -> Any:
        axes = tuple(sorted(set(eqn.params["axes"]) - compat.varying_axes(x)))
        return lax.pcast(x, axes, to="varying") if axes else x

    return [jax.tree.map(cast, weight)]


def reshard(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """``jax.sharding.reshard``: the parts are resharded with the weight."""
    (weight,) = args
    (base,) = bind_base(eqn, args)
    to = eqn.params["dst_sharding"]

    def move(array: Any, spec: PartitionSpec) -> Any:
        return compat.bind(eqn, [array], dst_sharding=NamedSharding(to.mesh, spec))[0]

    return [map_with_specs(weight, to.spec, base, move)]


def device_put(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A weight fetched from host memory, or moved elsewhere: parts not there yet move along."""

    def moved(value: Factored, base: Any, to: Any) -> Factored:
        if isinstance(to, Format):
            to = to.sharding  # the layout is for the base
        if isinstance(to, NamedSharding):
            sharding = functools.partial(NamedSharding, to.mesh, memory_kind=to.memory_kind)
            return map_with_specs(value, to.spec, base, lambda x, spec: compat.device_put(x, sharding(spec)))
        if isinstance(to, jax.sharding.Sharding | jax.Device):
            return value.map_parts(base, lambda part: part.apply(lambda x: compat.device_put(x, to)))
        return dataclasses.replace(value, base=base).to_memory_of(base)

    moves = zip(args, bind_base(eqn, args), eqn.params["devices"], strict=True)
    return [moved(v, base, to) if isinstance(v, Factored) else base for v, base, to in moves]


def all_gather(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A sharded weight, gathered for its use: its parts are gathered along the same dimension."""
    (weight,) = args
    if not eqn.params["tiled"]:
        raise Decline("it is gathered along a new axis (lax.all_gather with tiled=True has a factored form)")
    (base,) = bind_base(eqn, args)

    def gather(array: Any, axis: int) -> Any:
        return compat.bind(eqn, [array], all_gather_dimension=axis)[0]

    return [weight.map_parts(base, lambda part: part.apply_along(eqn.params["all_gather_dimension"], gather))]


def label_all_gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    return values if eqn.params["tiled"] else walker.consume(eqn, values)
