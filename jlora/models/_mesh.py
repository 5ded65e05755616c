"""How activations are split over a mesh: by rows, over its axes ``data`` and ``fsdp``."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def row_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which the rows of ``x`` are split: those of ``data`` and ``fsdp`` that are Auto."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in ("data", "fsdp") if kinds.get(name) == AxisType.Auto)
    return () if x.shape[0] % math.prod(mesh.shape[name] for name in axes) else axes


def split_batch(x: jax.Array) -> jax.Array:
    """``x`` [batch, ...] with its batch split over the mesh axes ``data`` and ``fsdp``, if present.

    Otherwise, with weights split over ``fsdp``, the compiler would split the activations' features over it and keep the
    whole batch on every device. Axes that are not Auto, or do not divide the batch, are ignored.
    """
    if not (axes := row_axes(x)):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(axes)))


def gathered(weight: jax.Array, axis: int, x: jax.Array) -> jax.Array:
    """``weight`` with ``axis`` whole on every device that has a part of ``x``, split by `split_batch`.

    For a weight that a loop reads: the compiler would gather it in each iteration.
    """
    if not row_axes(x):
        return weight
    spec = (None if i == axis else PartitionSpec.UNCONSTRAINED for i in range(weight.ndim))
    mesh = jax.typeof(x).sharding.mesh
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec(*spec)))


def row_parts(x: jax.Array) -> int:
    """The number of parts into which `split_batch` divides ``x``."""
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in row_axes(x))
