"""Differences between the supported JAX versions (0.10.2 to 0.12), and what JAX stores in an array's type: its
memory space, its sharding, and the manual mesh axes along which it varies."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import compute_on as compute_on_module
from jax.extend import source_info_util
from jax.sharding import NamedSharding, PartitionSpec


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jaxpr and its constants, for a `Jaxpr`, a `ClosedJaxpr`, or 0.12's single class for both."""
    return (jaxpr.jaxpr, tuple(jaxpr.consts)) if hasattr(jaxpr, "consts") else (jaxpr, ())


def inner_jaxpr(eqn: Any) -> Any:
    """The jaxpr that a call equation runs."""
    return next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)


def bind(eqn: Any, args: list[Any], **overrides: Any) -> list[Any]:
    """Bind an equation's primitive to ``args`` unchanged; always a list of results."""
    params = eqn.primitive.get_bind_params(eqn.params | overrides)
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*subfuns, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """The name stack, source line and context manager under which ``eqn`` was traced."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Any, enclosing: Sequence[Any] = ()) -> str:
    """File, line and function of the user's code behind ``eqn``. An equation from a function that JAX itself jits
    has none, and takes that of the innermost ``enclosing`` equation with one."""
    found = (source_info_util.summarize(e.source_info) for e in (eqn, *reversed(enclosing)))
    return next(filter(None, found), "an unknown line")


def compute_on(fn: Any, params: dict[str, Any]) -> Any:
    """``fn`` on the device type in the params of a ``compute_on`` equation; its results are a list."""
    options = params["compiler_options_json"]
    # Its name before 0.11 was compute_on.
    transform: Any = getattr(compute_on_module, "compute_on2", compute_on_module.compute_on)
    return transform(
        fn,
        compute_type=params["compute_type"],
        out_memory_spaces=list(params["out_memory_spaces"]),
        compiler_options=None if options is None else json.loads(options),
    )


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of a scan's constants and carried values."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(tuple(consts.vals)), len(tuple(carry.vals))


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes (inside ``shard_map``) along which ``x`` varies."""
    return frozenset(getattr(getattr(jax.typeof(x), "mat", None), "varying", ()))


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """``arrays`` cast to vary along the union of their manual axes, as the operands of one primitive must."""
    union = frozenset().union(*map(varying_axes, arrays))
    missing = [tuple(sorted(union - varying_axes(x))) for x in arrays]
    return tuple(lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True))


def explicit_spec(x: Any) -> tuple[Any, ...] | None:
    """The PartitionSpec entries of ``x`` on a mesh with Explicit axes, else None."""
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty or not any(t == jax.sharding.AxisType.Explicit for t in mesh.axis_types):
        return None
    return tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))


def reshard(x: Any, spec: Iterable[Any]) -> Any:
    """``x`` with these PartitionSpec entries on a mesh with Explicit axes; ``x`` itself on any other."""
    entries = tuple(spec)
    if explicit_spec(x) in (None, entries):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*entries)))


def with_dtype(x: Any, dtype: Any) -> Any:
    """The type of ``x`` with another dtype: its shape, sharding and varying axes."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return jax.typeof(x).update(dtype=jnp.dtype(dtype), weak_type=False)


def device_put(x: Any, to: Any) -> Any:
    """`jax.device_put` whose gradient returns to the memory space of ``x``; JAX's own stays in host memory."""
    return jax.device_put(x, to, src=jax.typeof(x).memory_space)


def to_memory_of(x: Any, other: Any) -> Any:
    """``x`` in the memory space of ``other``: the device's or the host's."""
    space = jax.typeof(other).memory_space
    return x if jax.typeof(x).memory_space == space else device_put(x, space)


def to_device(x: Any) -> Any:
    """``x`` in device memory."""
    return x if jax.typeof(x).memory_space == jax.memory.Space.Device else device_put(x, jax.memory.Space.Device)


def out_aval(fn: Any, *avals: Any, **params: Any) -> Any:
    """The type of the result of ``fn`` with static ``params``; cached, as it is traced to find out."""
    return _out_aval(fn, avals, tuple(params.items()), jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=1024)
def _out_aval(fn: Any, avals: Any, params: Any, mesh: Any) -> Any:
    return jax.make_jaxpr(functools.partial(fn, **dict(params)))(*avals).out_avals[0]


def is_partitioned(ctx: Any) -> bool:
    """Whether the compiler divides the program being lowered over several devices, rather than the program itself
    (``shard_map``, ``pmap``) or nobody."""
    context = ctx.module_context.axis_context
    if (mesh := getattr(context, "mesh", None)) is not None:
        return frozenset(mesh.axis_names) != frozenset(context.manual_axes)
    return getattr(context, "num_devices", 1) != 1


def is_divided(aval: Any) -> bool:
    """Whether the compiler may divide a value of this type over devices: some axis of its mesh is not Manual."""
    mesh = aval.sharding.mesh
    return mesh.size > 1 and any(kind != jax.sharding.AxisType.Manual for kind in mesh.axis_types)
