"""`lora` on a mesh with Explicit axes, where shardings are part of the types, and JAX refuses to guess."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jlora
from tests.toys import (
    FULLY_SHARDED,
    MLP,
    SPLIT,
    TOYS,
    adapted_loss,
    adapters_for,
    assert_close,
    assert_law,
    loss_of,
    merged_loss,
    mlp,
    normal,
    stack,
    stacked,
    tensor_parallel,
)


@functools.cache
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


ROWS = P("data", None)


def columns_then_rows(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["w0"] + params["bias"])
    return jnp.einsum("bi,io->bo", hidden, params["w1"], out_sharding=ROWS)


def rows_then_columns(params: Any, x: Any) -> Any:
    x = jax.sharding.reshard(x, P("data", "tensor"))
    hidden = jnp.einsum("bi,io->bo", x, params["w0"], out_sharding=ROWS)
    return jnp.tanh(hidden + params["bias"]) @ params["w1"]


def resharded(params: Any, x: Any) -> Any:
    return columns_then_rows({k: jax.sharding.reshard(w, SPLIT[k]) for k, w in params.items()}, x)


def manual(params: Any, x: Any) -> Any:
    return jax.shard_map(tensor_parallel, in_specs=(SPLIT, P("data")), out_specs=P("data"))(params, x)


def scanned(params: Any, x: Any) -> Any:
    def one(h: Any, w: Any) -> Any:
        return jnp.einsum("bi,io->bo", jnp.tanh(h @ w["up"]), w["down"], out_sharding=ROWS), None

    return lax.scan(jax.checkpoint(one, policy=jax.checkpoint_policies.dots_saveable), x, params)[0]


def attention_heads(params: Any, x: Any) -> Any:
    heads = jnp.einsum("bi,ihd->bhd", x, params["q"])
    return jnp.einsum("bhd,hdo->bo", jnp.tanh(heads), params["o"], out_sharding=ROWS)


def two_experts(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(jnp.einsum("bi,eio->ebo", x, params["up"]))
    return jnp.einsum("ebi,eio->ebo", hidden, params["down"])


def tied_table(params: Any, ids: Any) -> Any:
    hidden = params["table"].at[ids].get(out_sharding=ROWS)
    return jnp.einsum("bi,vi->bv", jnp.tanh(hidden), params["table"], out_sharding=P("data", "tensor"))


HEADS = {"q": normal(31, 8, 4, 5), "o": normal(32, 4, 5, 8)}
SPLIT_LAYERS = {"up": P(None, None, "tensor"), "down": P(None, "tensor", None)}
EXPLICIT: dict[str, tuple[Callable[..., Any], Any, Any, Any]] = {
    "columns_then_rows": (columns_then_rows, MLP.params, SPLIT, MLP.x),
    "rows_then_columns": (
        rows_then_columns,
        MLP.params,
        {"w0": P("tensor", None), "bias": P(), "w1": P(None, "tensor")},
        MLP.x,
    ),
    "replicated": (columns_then_rows, MLP.params, P(), MLP.x),
    "resharded": (resharded, MLP.params, FULLY_SHARDED, MLP.x),
    "shard_map": (manual, MLP.params, SPLIT, MLP.x),
    "jit": (jax.jit(columns_then_rows), MLP.params, SPLIT, MLP.x),
    "scan": (scanned, TOYS["stacked"].params, SPLIT_LAYERS, MLP.x),
    "heads": (attention_heads, HEADS, {"q": P(None, "tensor", None), "o": P("tensor", None, None)}, MLP.x),
    "experts": (two_experts, TOYS["experts"].params, P("tensor", None, None), MLP.x),
    "table": (tied_table, {"table": normal(33, 12, 8)}, P("tensor", None), jnp.arange(16) % 12),
}


def explicit(name: str, **config: Any) -> Any:
    """Model, adapters (replicated), parameters and rows; to be called under the mesh."""
    fn, params, places, x = EXPLICIT[name]
    params = {k: jax.device_put(w, places[k] if isinstance(places, dict) else places) for k, w in params.items()}
    x = jax.device_put(x, P("data", *(None,) * (x.ndim - 1)))
    return fn, jax.device_put(adapters_for(fn, params, x, **config), P()), params, x


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_mesh(name: str) -> None:
    """Both products and all their gradients have shardings: the merged model's loss and gradient, not materialized."""
    with jax.set_mesh(mesh()):
        assert_law(*explicit(name))


def test_explicit_mesh_keeps_types() -> None:
    """The adapted model's result is sharded like the base's, and gradients like their factors."""
    with jax.set_mesh(mesh()):
        fn, adapters, params, x = explicit("columns_then_rows")
        adapters["w0"] = dataclasses.replace(adapters["w0"], b=jax.device_put(adapters["w0"].b, P(None, "tensor")))
        apply = jlora.lora(fn)
        result = jax.jit(lambda a: apply(jlora.attach(params, a), x))(adapters)
        assert jax.typeof(result).sharding == jax.typeof(fn(params, x)).sharding
        grads = jax.jit(jax.grad(adapted_loss(fn)))(adapters, params, x)
        for grad, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(adapters), strict=True):
            assert jax.typeof(grad) == jax.typeof(leaf)


def test_explicit_mesh_with_many_adapters() -> None:
    """vmap over adapters that are sharded over "data" equals a vmap of the merged model."""
    with jax.set_mesh(mesh()):
        params = {k: jax.device_put(w, SPLIT[k]) for k, w in MLP.params.items()}
        adapters = jax.device_put(stack(adapters_for(mlp, MLP.params, MLP.x), 4), P("data"))
        x = jax.device_put(MLP.x[:4], ROWS)

        def model(params: Any, x: Any) -> Any:
            hidden = jnp.tanh(x @ params["w0"] + params["bias"])
            return jnp.einsum("i,io->o", hidden, params["w1"], out_sharding=P(None))

        steps = [jax.value_and_grad(loss(model)) for loss in (adapted_loss, merged_loss)]
        assert_close(*jax.jit(lambda *args: [jax.vmap(s, (0, None, 0))(*args) for s in steps])(adapters, params, x))


@pytest.mark.parametrize("name", ["columns_then_rows", "scan", "experts"])
def test_explicit_mesh_with_dropout(name: str) -> None:
    """Masks are sharded like the activations: the numbers are the same as without a mesh."""
    fn, params, _, x = EXPLICIT[name]
    key = jax.random.key(0)

    def loss(fn: Any, adapters: Any, params: Any, x: Any) -> Any:
        apply = jlora.lora(fn, materialize="error")
        return loss_of(apply(jlora.attach(params, adapters, dropout_key=key), x))

    with jax.set_mesh(mesh()):
        fn, adapters, params, x = explicit(name, dropout=0.5)
        value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, fn)))(adapters, params, x)
    plain = {"columns_then_rows": mlp, "scan": stacked, "experts": TOYS["experts"].fn}[name]
    there = jax.device_get((adapters, params, x))
    assert_close(jax.device_get((value, grads)), jax.jit(jax.value_and_grad(functools.partial(loss, plain)))(*there))


def test_explicit_mesh_with_dora() -> None:
    """DoRA's norms are taken over sharded inputs; merging agrees."""
    with jax.set_mesh(mesh()):
        fn, _, params, x = explicit("columns_then_rows")
        config = jlora.LoraConfig(rank=2, use_dora=True)
        adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(fn, params, x))
        adapters = jax.device_put(jax.device_get(jax.tree.map(lambda x: x + 0.1, adapters)), P())
        losses = [jax.jit(loss(fn))(adapters, params, x) for loss in (adapted_loss, merged_loss)]
        assert_close(*losses)
