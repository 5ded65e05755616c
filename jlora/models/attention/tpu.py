"""Attention on a TPU: the splash kernels that ship with JAX (`jax.experimental.pallas.ops.tpu.splash_attention`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jlora.models._mesh import row_axes
from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring

_BLOCK, _LANES = 512, 128
"""Queries and keys of a block, and what divides one."""


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    window: int | None,
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> jax.Array:
    """What `plain` gives for this mask and window, at queries that see a key. Without dropout and without a cache.

    A kernel cannot be divided by the compiler: on a mesh each device has its own rows and heads (`jax.shard_map`).
    """
    block = min(_BLOCK, -(-mask.length // _LANES) * _LANES)
    missing = -mask.length % block
    # Padding is a segment of its own, which no query is in.
    queries, keys = mask.queries, mask.keys
    if missing and keys is None:
        keys = jnp.zeros((1, mask.length), jnp.int32)
    if keys is not None:
        queries = jnp.zeros((1, mask.length), jnp.int32) if queries is None else queries
        queries, keys = (jnp.broadcast_to(x, query.shape[:2]) for x in (queries, keys))
        queries = jnp.pad(queries, ((0, 0), (0, missing)))
        keys = jnp.pad(keys, ((0, 0), (0, missing)), constant_values=-1)
    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (query, key, value)]
    run = partial(
        _splash, causal=mask.causal, window=window, block=block, scoring=scoring._replace(key=None), interpret=interpret
    )
    return _over_devices(run, *padded, queries, keys)[:, : mask.length]


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: jax.Array | None,
    keys: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    block: int,
    scoring: Scoring,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, length, heads, _ = query.shape
    shape = (length, length)
    if not causal:
        seen: Any = kernels.FullMask(shape)
    elif window is None or window >= length:
        seen = kernels.CausalMask(shape)
    else:
        seen = kernels.LocalMask(shape, (window - 1, 0), 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: Any = {f"block_{name}": block for name in names}
    kernel: Any = kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([seen] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**sizes),
        attn_logits_soft_cap=scoring.softcap,
        interpret=interpret,
    )
    query = (query.astype(jnp.float32) * scoring.scale).astype(query.dtype)
    operands = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    segments = None if queries is None or keys is None else kernels.SegmentIds(queries, keys)
    found = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(*operands, segments)
    return jnp.swapaxes(found, 1, 2).astype(query.dtype)


def _over_devices(
    fn: Any, query: jax.Array, key: jax.Array, value: jax.Array, *segments: jax.Array | None
) -> jax.Array:
    """``fn`` for the rows and heads of each device, if the arrays are on a mesh with Auto axes."""
    mesh = jax.typeof(query).sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = {name for name, kind in kinds.items() if kind == AxisType.Auto}
    if not auto or mesh.size == 1:
        return fn(query, key, value, *segments)
    rows = row_axes(query)
    heads = "tensor" if "tensor" in auto and key.shape[2] % mesh.shape["tensor"] == 0 else None
    whole, flat = P(rows or None, None, heads, None), P(rows or None, None)
    specs = (whole, whole, whole, *(None if x is None else flat for x in segments))
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(query, key, value, *segments)
