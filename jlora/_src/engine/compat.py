"""Everything that differs between the supported JAX versions (0.10.2 to 0.12), and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import compute_on as places
from jax.extend import core, source_info_util
from jax.sharding import NamedSharding, PartitionSpec

_CALLS = ("jit", "pjit", "remat2", "checkpoint", "scan")
"""Primitives with an inner ``jaxpr`` whose inputs and outputs are theirs."""


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jaxpr and its constants, for a `Jaxpr`, a `ClosedJaxpr`, or the one class that 0.12 has for both."""
    return (jaxpr.jaxpr, tuple(jaxpr.consts)) if hasattr(jaxpr, "consts") else (jaxpr, ())


def call_of(eqn: Any) -> Any:
    """The jaxpr inside an equation that has one."""
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


def source_line(eqn: Any, around: Sequence[Any] = ()) -> str:
    """File, line and function of the user's code that made ``eqn``; of the innermost equation ``around`` it that has
    one where it has none, as inside the functions that JAX itself jits."""
    found = (source_info_util.summarize(e.source_info) for e in (eqn, *reversed(around)))
    return next(filter(None, found), "an unknown line")


def compute_on(fn: Any, params: dict[str, Any]) -> Any:
    """``fn`` on the kind of device that the params of a ``compute_on`` equation say; its results are a list."""
    options = params["compiler_options_json"]
    on: Any = getattr(places, "compute_on2", places.compute_on)  # its name before 0.11
    return on(
        fn,
        compute_type=params["compute_type"],
        out_memory_spaces=list(params["out_memory_spaces"]),
        compiler_options=None if options is None else json.loads(options),
    )


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(tuple(consts.vals)), len(tuple(carry.vals))


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes (inside ``shard_map``) along which ``x`` varies."""
    return frozenset(getattr(getattr(jax.typeof(x), "mat", None), "varying", ()))


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """``arrays`` cast to vary along the union of their manual axes, as the operands of one primitive must."""
    union = frozenset().union(*map(varying, arrays))
    missing = [tuple(sorted(union - varying(x))) for x in arrays]
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


def put(x: Any, to: Any) -> Any:
    """`jax.device_put`, whose gradient comes back into the memory of ``x``; JAX's own stays in the host's."""
    return jax.device_put(x, to, src=jax.typeof(x).memory_space)


def beside(x: Any, other: Any) -> Any:
    """``x`` in the memory, the device's or the host's, in which ``other`` lies."""
    space = jax.typeof(other).memory_space
    return x if jax.typeof(x).memory_space == space else put(x, space)


def on_device(x: Any) -> Any:
    """``x`` in the device's memory."""
    return x if jax.typeof(x).memory_space == jax.memory.Space.Device else put(x, jax.memory.Space.Device)


def live_inputs(jaxpr: Any) -> set[Any]:
    """The input variables that some result or effect of an open jaxpr depends on, or that it returns."""
    live = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if not eqn.effects and not any(v in live for v in eqn.outvars):
            continue
        used = eqn.invars
        if eqn.primitive.name in (*_CALLS, "shard_map"):
            inner, _ = open_jaxpr(eqn.params["jaxpr"])
            inside = live_inputs(inner)
            used = [v for v, inner_v in zip(eqn.invars, inner.invars, strict=True) if inner_v in inside]
        live |= {v for v in used if isinstance(v, core.Var)}
    return live


def handed_on(jaxpr: Any) -> list[int | None]:
    """For each result of an open jaxpr, which of its inputs it is, unchanged, through any jit, remat or scan."""
    place: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _CALLS:
            continue
        inner, _ = open_jaxpr(eqn.params["jaxpr"])
        consts, carried = scan_split(eqn.params) if eqn.primitive.name == "scan" else (0, 0)
        for i, (out, source) in enumerate(zip(eqn.outvars, handed_on(inner), strict=True)):
            if source is None or not isinstance(eqn.invars[source], core.Var) or eqn.invars[source] not in place:
                continue
            # A scan carries it to itself, or slices it and stacks it again.
            if eqn.primitive.name != "scan" or (source - consts == i if i < carried else source >= consts + carried):
                place[out] = place[eqn.invars[source]]
    return [place.get(v) if isinstance(v, core.Var) else None for v in jaxpr.outvars]
