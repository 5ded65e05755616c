"""Weights in host memory (``pinned_host``) that the model fetches where it uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import compute_on as compute
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.toys import MLP, TOYS, adapted_loss, adapters_for, assert_close, layer, loss_of, merged_loss, mlp, tied

Space = jax.memory.Space


def offloaded(tree: Any) -> Any:
    """The tree in host memory."""
    return jax.device_put(tree, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def places(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def fetch(tree: Any, to: Any = Space.Device) -> Any:
    return jax.device_put(tree, to)


def by_sharding(params: Any, x: Any) -> Any:
    """Fetched by one device's sharding, and by a mesh's."""
    w0 = fetch(params["w0"], SingleDeviceSharding(jax.devices()[0], memory_kind="device"))
    mesh = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    w1 = fetch(params["w1"], NamedSharding(mesh, P(None, "one"), memory_kind="device"))
    return jnp.tanh(x @ w0 + fetch(params["bias"])) @ w1


def with_shardings(params: Any, x: Any) -> Any:
    """The inner jit has memory kinds for its weight, as an argument and as a result."""
    mesh = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    host, device = (NamedSharding(mesh, P(), memory_kind=kind) for kind in ("pinned_host", "device"))
    params = {name: jax.device_put(w, host) for name, w in params.items()}
    moved = jax.jit(lambda w: jax.device_put(w, device), in_shardings=host, out_shardings=device)
    return mlp({name: moved(w) for name, w in params.items()}, x)


def on_the_host(params: Any, x: Any) -> Any:
    """The first product is computed where its weight is stored."""
    on: Any = getattr(compute, "compute_on2", compute.compute_on)  # its name before jax 0.11
    product = on(lambda w, x: x @ w, compute_type="device_host", out_memory_spaces=Space.Host)
    return jnp.tanh(fetch(product(params["w0"], fetch(x, Space.Host))) + fetch(params["bias"])) @ fetch(params["w1"])


def stacked(params: Any, x: Any) -> Any:
    """Each layer is fetched when its turn comes."""
    return lax.scan(lambda h, w: layer(h, fetch(w)), x, params)[0]


def by_index(params: Any, x: Any) -> Any:
    for i in range(2):
        x, _ = layer(x, fetch({name: w[i] for name, w in params.items()}))
    return x


def looked_up(params: Any, ids: Any) -> Any:
    """Rows are picked on the host; as an output projection, the table is fetched."""
    return jnp.tanh(fetch(params["table"][fetch(ids, Space.Host)] + params["bias"])) @ fetch(params["table"]).T


def fetch_all(model: Any) -> Any:
    return lambda params, x: model(fetch(params), x)


MODELS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "one by one": (lambda p, x: mlp({name: fetch(w) for name, w in p.items()}, x), "mlp"),
    "all at once": (fetch_all(mlp), "mlp"),
    "fetched twice": (fetch_all(fetch_all(mlp)), "mlp"),
    "transposed on the host": (lambda p, x: jnp.tanh(x @ fetch(p["w1"].T)) @ fetch(p["w0"][:, ::-1].T), "mlp"),
    "in jit": (jax.jit(fetch_all(mlp)), "mlp"),
    "in checkpoint": (jax.checkpoint(fetch_all(mlp)), "mlp"),
    "with shardings": (with_shardings, "mlp"),
    "by sharding": (by_sharding, "mlp"),
    "on the host": (on_the_host, "mlp"),
    "in a scan": (stacked, "stacked"),
    "in a rematerialized scan": (
        lambda p, x: lax.scan(jax.checkpoint(lambda h, w: layer(h, fetch(w))), x, p)[0],
        "stacked",
    ),
    "by index": (by_index, "stacked"),
    "looked up": (looked_up, "tied"),
    "fetched to be looked up": (fetch_all(tied), "tied"),
}

FORWARD_ONLY = {"on the host", "looked up"}
"""JAX (0.10 to 0.12) does not differentiate through these in host memory, with or without adapters."""


@pytest.mark.sampled(8)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("where", ["adapters on the device", "adapters on the host"])
@pytest.mark.parametrize("name", MODELS)
def test_an_offloaded_model_is_the_merged_one(name: str, where: str, jit: bool) -> None:
    """Values, and gradients of the adapters, are those of the merged model; weights are fetched factored."""
    model, toy = MODELS[name][0], TOYS[MODELS[name][1]]
    params = offloaded(toy.params)
    adapters = adapters_for(model, params, toy.x)
    assert set(adapters) == set(adapters_for(toy.fn, toy.params, toy.x)), "trace looks through the transfer"
    given = offloaded(adapters) if where.endswith("host") else adapters
    forward = jax.jit if jit else lambda fn: fn
    if name in FORWARD_ONLY:
        losses = [forward(loss(model))(given, params, toy.x) for loss in (adapted_loss, merged_loss)]
        assert_close(*losses)
        return
    value, grads = forward(jax.value_and_grad(adapted_loss(model)))(given, params, toy.x)
    expected = jax.jit(jax.value_and_grad(merged_loss(model)))(adapters, params, toy.x)
    assert_close((value, fetch(grads)), expected)
    assert places(grads) == places(given)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_stay_in_the_memory_of_their_base(use_dora: bool) -> None:
    """init, merge, unmerge and rounding give the same numbers as on the device; trainables are stored there."""
    params = {**TOYS["stacked"].params, "bias": MLP.params["bias"]}
    fn = lambda p, x: stacked({k: w for k, w in p.items() if k != "bias"}, x) + p["bias"][:8]  # noqa: E731
    uses = jlora.trace(fn, params, TOYS["stacked"].x)
    config = jlora.LoraConfig(rank=2, targets=("up", "down"), train_also=("bias",), use_dora=use_dora)
    both = {}
    for where, base in (("device", params), ("pinned_host", offloaded(params))):
        adapters = jlora.init(jax.random.key(0), base, config, uses)
        assert places(adapters) == {"device"}
        adapters = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), adapters)
        merged, jitted = jlora.merge(base, adapters), jax.jit(jlora.merge)(base, adapters)
        assert places(merged) == places(jitted) == {where}
        plain = {} if use_dora else {path: f for path, f in adapters.items() if path != "bias"}
        back = jlora.unmerge(merged, plain)
        assert places(back) == {where}
        both[where] = [fetch(x) for x in (adapters, merged, jitted, back)], jlora.rounding(base, adapters)
    assert_close(both["pinned_host"][0], both["device"][0], 1e-6)
    assert both["pinned_host"][1] == pytest.approx(both["device"][1], rel=1e-3)


@pytest.mark.parametrize("name", ["all at once", "in a scan"])
@pytest.mark.parametrize("how", ["dora", "dropout", "whole"])
def test_methods_on_offloaded_weights(name: str, how: str) -> None:
    """DoRA takes the norm of a base in host memory; dropout keys and leaves trained whole are fetched like weights."""
    model, toy = MODELS[name][0], TOYS[MODELS[name][1]]
    options = {"dora": {"use_dora": True}, "dropout": {"dropout": 0.5}}.get(how, {})
    adapters: dict[str, Any] = adapters_for(toy.fn, toy.params, toy.x, **options)
    if how == "whole":
        adapters |= {path: 1.1 * w for path, w in list(toy.params.items())[:1]}
    key = jax.random.key(0) if how == "dropout" else None
    apply = jlora.lora(model, materialize="error")

    def loss(adapters: Any, params: Any) -> Any:
        return loss_of(apply(jlora.attach(params, adapters, dropout_key=key), toy.x))

    run = jax.jit(jax.value_and_grad(loss))
    assert_close(run(adapters, offloaded(toy.params)), run(adapters, toy.params))


def test_weights_that_nothing_fetches_are_refused_as_by_the_model_itself() -> None:
    """A product of arrays in two memory spaces is JAX's own error, with or without adapters."""
    params = offloaded(MLP.params)
    tree = jlora.attach(params, adapters_for(mlp, MLP.params, MLP.x))
    for apply, given in ((mlp, params), (jlora.lora(mlp), tree)):
        with pytest.raises(ValueError, match="memory_space"):
            apply(given, MLP.x)
