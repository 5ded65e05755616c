"""What is frozen has no gradient by default, so that no loop over a whole attached tree trains the base by accident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import _encoder, _measure
from tests.toys import MLP, TOYS, adapters_for, assert_close, loss_of, mlp


def tree_of(name: str) -> Any:
    toy = TOYS[name]
    return jlora.attach(toy.params, adapters_for(toy.fn, toy.params, toy.x))


def plain(loss: Callable[..., Any]) -> Callable[..., Any]:
    return loss


def in_scan(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: lax.scan(lambda c, _: (c + loss(*args), None), 0.0, None, length=1)[0]


def in_vmap(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tree, x: jax.vmap(loss, (0, None))(jax.tree.map(lambda leaf: leaf[None], tree), x).sum()


AROUND = {"plain": plain, "jit": jax.jit, "remat": jax.checkpoint, "scan": in_scan, "vmap": in_vmap}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("name", TOYS)
def test_the_gradient_of_a_whole_tree_is_that_of_the_adapters(name: str, around: Any) -> None:
    """Zero for every frozen leaf, also for those without adapters; what trains, and the inputs, have their gradients;
    with ``frozen_gradients`` the base has the one that it has in the merged model."""
    toy, tree = TOYS[name], tree_of(name)
    params, adapters = jlora.detach(tree)
    floating = jnp.issubdtype(toy.x.dtype, jnp.floating)

    def grads(apply: Any, tree: Any) -> Any:
        loss = around(lambda tree, x: loss_of(apply(tree, x)))
        if not floating:
            return jax.grad(loss)(tree, toy.x), 0.0
        return jax.grad(loss, argnums=(0, 1))(tree, toy.x)

    whole, dx = grads(jlora.lora(toy.fn, materialize="error"), tree)
    frozen, found = jlora.detach(whole)
    assert all(not np.any(g) for g in jax.tree.leaves(frozen))
    alone = jax.grad(lambda a: loss_of(jlora.lora(toy.fn)(jlora.attach(params, a), toy.x)))(adapters)
    assert_close(found, alone)
    merged, merged_dx = grads(toy.fn, jlora.merge(params, adapters))
    assert_close(dx, merged_dx)
    true, true_dx = grads(jlora.lora(toy.fn, materialize="error", frozen_gradients=True), tree)
    assert_close((jlora.detach(true)[0], true_dx), (merged, merged_dx))


def test_leaves_of_every_kind() -> None:
    """Keys, integers, float8 and weights trained whole; by keyword; a strength keeps its gradient."""
    params = {**MLP.params, "scale": jnp.ones(8), "ids": jnp.arange(3), "key": jax.random.key(0), "flag": True}
    params["small"] = jnp.ones((8, 8), jnp.float8_e4m3fn)
    config = jlora.LoraConfig(rank=2, targets=("w0",), train_also=("bias",))
    adapters = jlora.init(jax.random.key(0), {k: v for k, v in params.items() if k != "flag"}, config)
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)

    def fn(x: Any, *, params: Any) -> Any:
        assert params["flag"] is True
        noise = jax.random.normal(params["key"], (8,)) + params["ids"].sum()
        return mlp(params, x) * params["scale"] + noise + x @ params["small"].astype("float32")

    def loss(floats: Any, strength: Any, x: Any, **options: Any) -> Any:
        tree = jlora.attach(params | floats, adapters, strength=strength)
        return loss_of(jlora.lora(fn, **options)(x, params=tree))

    floats = {name: params[name] for name in ("w0", "w1", "bias", "scale", "small")}
    args = (floats, jnp.float32(0.5), MLP.x)
    grads = jax.grad(loss, argnums=(0, 1, 2))(*args)
    assert all(not np.any(np.asarray(g, np.float32)) for g in grads[0].values())
    true = jax.grad(lambda *args: loss(*args, frozen_gradients=True), argnums=(0, 1, 2))(*args)
    assert_close(grads[1:], true[1:])
    assert np.any(grads[1])
    assert all(np.any(np.asarray(true[0][name], np.float32)) for name in ("w0", "w1", "scale", "small"))
    assert not np.any(true[0]["bias"])  # its copy is used in its place


def test_another_argument_has_its_gradient() -> None:
    """Only the argument that has adapters is frozen."""
    tree = tree_of("mlp")
    fn = lambda params, extra, x: mlp(params, x) @ extra["w"]  # noqa: E731
    grads = jax.grad(lambda e: loss_of(jlora.lora(fn)(tree, e, MLP.x)))({"w": jnp.eye(8)})
    expected = jax.grad(lambda e: loss_of(fn(jlora.merge(*jlora.detach(tree)), e, MLP.x)))({"w": jnp.eye(8)})
    assert_close(grads, expected)


def test_a_base_that_is_computed_from_what_trains() -> None:
    """An adapted model inside another one, and weights made by a function: the option gives the gradient."""
    adapters = jlora.detach(tree_of("mlp"))[1]
    outer = adapters_for(mlp, MLP.params, MLP.x, seed=40)

    def loss(outer: Any, inner: Any) -> Any:
        model = jlora.lora(lambda p, x: inner(jlora.attach(p, adapters), x))
        return loss_of(model(jlora.attach(MLP.params, outer), MLP.x))

    def merged(outer: Any) -> Any:
        return loss_of(mlp(jlora.merge(jlora.merge(MLP.params, outer), adapters), MLP.x))

    assert_close(jax.grad(loss)(outer, jlora.lora(mlp, frozen_gradients=True)), jax.grad(merged)(outer))
    uses = jlora.trace(lambda p, x: jlora.lora(mlp)(jlora.attach(p, adapters), x), MLP.params, MLP.x)
    assert {use.kind for use in uses.values()} == {"stopped"}  # so that a plan says that nothing would train


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind: Any) -> None:
    """Split weights and rows; inside a shard_map, where values vary over devices, too."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind, kind))
    split = {"w0": P(None, "tensor"), "bias": P("tensor"), "w1": P("tensor", None)}
    params = {name: jax.device_put(MLP.params[name], NamedSharding(mesh, split[name])) for name in split}
    x = jax.device_put(MLP.x, NamedSharding(mesh, P("data", None)))
    tree = jlora.attach(params, {"w0": jlora.detach(tree_of("mlp"))[1]["w0"]})
    with jax.set_mesh(mesh):
        apply = jlora.lora(lambda p, x: jnp.tanh(x @ p["w0"] + p["bias"]), materialize="error")
        tree = jlora.attach({k: params[k] for k in ("w0", "bias")}, {"w0": jlora.detach(tree)[1]["w0"]})
        whole = jax.jit(jax.grad(lambda tree: loss_of(apply(tree, x))))(tree)
    expected = jax.grad(lambda tree: loss_of(apply(tree, MLP.x)))(jax.device_get(tree))
    assert_close(jax.device_get(whole), expected)
    assert not np.any(whole["w0"].base) and not np.any(whole["bias"])
    assert whole["w0"].base.sharding.is_equivalent_to(tree["w0"].base.sharding, 2) or kind == AxisType.Auto

    if kind == AxisType.Auto:
        mapped = jax.shard_map(
            lambda tree, x: lax.pmean(loss_of(apply(tree, x)), "data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        inside = jax.jit(jax.grad(mapped))(jax.device_get(tree), MLP.x)
        assert not np.any(inside["w0"].base) and not np.any(inside["bias"])
        assert np.any(inside["w0"].factors.b)


# Loops that people write.


class Linear(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.last = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(jnp.tanh(self.first(x)))


def loss(tree: Any) -> Any:
    return loss_of(jlora.lora(mlp)(tree, MLP.x))


def by_optax(tree: Any, tx: Any) -> Any:
    state = tx.init(tree)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def by_train_state(tree: Any, tx: Any) -> Any:
    state = TrainState.create(apply_fn=jlora.lora(mlp), params=tree, tx=tx)
    for _ in range(3):
        state = state.apply_gradients(grads=jax.grad(lambda p, s=state: loss_of(s.apply_fn(p, MLP.x)))(state.params))
    return state.params


OPTIMIZERS = {"sgd": optax.sgd(0.05), "momentum": optax.sgd(0.05, momentum=0.9), "adam": optax.adam(0.05)}


@pytest.mark.parametrize("loop", [by_optax, by_train_state])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_over_the_tree_trains_the_adapters_alone(name: str, loop: Any) -> None:
    """The base stays the same bit for bit, and the adapters are trained as they are alone."""
    tree = tree_of("mlp")
    params, found = jlora.detach(loop(tree, OPTIMIZERS[name]))
    for path, leaf in MLP.params.items():
        np.testing.assert_array_equal(params[path], leaf)
    adapters: Any = jlora.detach(tree)[1]
    tx = OPTIMIZERS[name]
    state = tx.init(adapters)
    for _ in range(3):
        grads = jax.grad(lambda a: loss(jlora.attach(MLP.params, a)))(adapters)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    assert_close(found, adapters)


@pytest.mark.parametrize(("name", "steps"), [("sgd", 3), ("adam", 1)])
def test_an_nnx_optimizer_over_an_attached_module_trains_the_adapters_alone(name: str, steps: int) -> None:
    """`nnx.Optimizer` of the tree that holds the adapters updates them and nothing else. (NNX cannot restore moments
    whose leaf is itself a tree: give Adam the adapters.)"""
    module = Linear(nnx.Rngs(0))
    adapters = jlora.init(jax.random.key(0), module, jlora.LoraConfig(rank=2, targets=("kernel",)))
    model = jlora.attach(module, adapters)
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)
    apply = jlora.lora(lambda m, x: m(x), materialize="error")
    before = jax.tree.map(jnp.copy, jlora.detach(model))
    for _ in range(steps):
        optimizer.update(model, nnx.grad(lambda m: loss_of(apply(m, MLP.x)))(model))
    after = jlora.detach(model)
    for a, b in zip(*map(jax.tree.leaves, (before[0], after[0])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before[1], after[1])), strict=True))


def test_weight_decay_moves_what_is_frozen_and_freeze_does_not() -> None:
    """A zero gradient is not a zero update: adamw multiplies a frozen weight by ``(1 - rate · decay)`` at each step."""
    tree = tree_of("mlp")
    moved = jlora.detach(by_optax(tree, optax.adamw(0.1, weight_decay=0.2)))[0]
    for path, leaf in MLP.params.items():
        np.testing.assert_allclose(moved[path], leaf * (1 - 0.1 * 0.2) ** 3, rtol=1e-5)
    kept = jlora.detach(by_optax(tree, jlora.freeze(optax.adamw(0.1, weight_decay=0.2))))[0]
    for path, leaf in MLP.params.items():
        np.testing.assert_array_equal(kept[path], leaf)


# What it costs.


def test_no_loop_pays_for_the_gradient_of_a_frozen_weight() -> None:
    """The gradient of a whole tree has no matmul with a weight's shape and no more FLOPs than that of the adapters;
    neither the loop of the adapters nor that of `freeze` needs more memory or FLOPs than with the true gradients."""
    shape = _encoder.Shape(layers=1, width=128, batch=3, tokens=37)
    params, (x, target) = _encoder.make_params(shape, "float32"), _encoder.make_batch(shape, "float32")
    config = jlora.LoraConfig(rank=8)
    adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(_encoder.encode, params, x))
    tree = jlora.attach(params, adapters)
    tx = jlora.freeze(optax.adam(0.1))
    weights = [shape.linear(name) for name in _encoder.LINEARS]

    def programs(**options: Any) -> Any:
        apply = jlora.lora(_encoder.encode, **options)

        def loss(tree: Any) -> Any:
            return _encoder.loss(apply(tree, x), target)

        def frozen(tree: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return optax.apply_updates(tree, updates), state

        alone = jax.grad(lambda a, params: loss(jlora.attach(params, a)))
        return {
            "alone": _measure.compile_program(alone, adapters, params),
            "whole": _measure.compile_program(jax.grad(loss), tree),
            "freeze": _measure.compile_program(frozen, tree, tx.init(tree)),
        }

    ours, true = programs(), programs(frozen_gradients=True)
    dots = {name: _measure.weight_shaped_dots(program.text, weights) for name, program in ours.items()}
    assert dots == dict.fromkeys(ours, 0)
    assert _measure.weight_shaped_dots(true["whole"].text, weights) == len(weights)
    assert ours["whole"].flops <= 1.001 * ours["alone"].flops < 0.9 * true["whole"].flops
    for name in ("alone", "freeze"):
        assert ours[name].flops <= 1.001 * true[name].flops
        assert ours[name].temporary_memory <= 1.001 * true[name].temporary_memory
