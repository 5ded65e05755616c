"""What changes from step to step without a new program: strength, dropout, and that nothing is compiled again."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.runs import compilations
from tests.toys import (
    FULLY_SHARDED,
    MLP,
    TOYS,
    adapters_for,
    assert_close,
    identity_adapters,
    loss_of,
    mlp,
)

# Compilations.


@pytest.mark.parametrize("on_a_mesh", [False, True])
@pytest.mark.parametrize("whole_tree", [False, True], ids=["adapters", "whole_tree"])
def test_the_second_step_compiles_nothing(whole_tree: bool, on_a_mesh: bool) -> None:
    """One program for all steps: other batches, strengths and dropout keys, on one device and on a mesh."""
    params, x = MLP.params, MLP.x
    adapters = adapters_for(mlp, params, x, dropout=0.5)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    if on_a_mesh:
        params = {k: jax.device_put(w, NamedSharding(mesh, FULLY_SHARDED[k])) for k, w in params.items()}
        adapters, x = jax.device_put((adapters, x), NamedSharding(mesh, P()))
    apply, adam = jlora.lora(mlp, materialize="error"), optax.adam(1e-2)
    tx = jlora.freeze(adam) if whole_tree else adam

    def step(state: Any, params: Any, x: Any, strength: Any, key: Any) -> Any:
        trained, moments = state

        def loss(trainable: Any) -> Any:
            if not whole_tree:
                return loss_of(apply(jlora.attach(params, trainable, strength=strength, dropout_key=key), x))
            base, adapters = jlora.detach(jlora.combine(trainable, jlora.partition(trained)[1]))
            return loss_of(apply(jlora.attach(base, adapters, strength=strength, dropout_key=key), x))

        grads = jax.grad(loss)(jlora.partition(trained)[0] if whole_tree else trained)
        updates, moments = tx.update(grads, moments, trained)
        return optax.apply_updates(trained, updates), moments

    trained = jlora.attach(params, adapters) if whole_tree else adapters
    moments = tx.init(trained)
    if on_a_mesh:  # optax counts steps on one device, until it is told where
        moments = jax.device_put(moments, NamedSharding(mesh, P()))
    # On a mesh the state is told to stay where it is, or the partitioner would split the adapters as their weights are.
    step = jax.jit(step, out_shardings=jax.tree.map(lambda x: x.sharding, (trained, moments)) if on_a_mesh else None)
    inputs = [(x + i, jnp.float32(i), jax.random.key(i)) for i in range(3)]
    with compilations() as first:
        state = jax.block_until_ready(step((trained, moments), params, *inputs[0]))
    with compilations() as later:
        for rest in inputs[1:]:
            state = jax.block_until_ready(step(state, params, *rest))
    assert first and not later


# Strength.


@pytest.mark.parametrize("name", TOYS)
def test_strength_scales_the_update(name: str) -> None:
    """A strength is a factor on B, whether for all weights or for each; with 0 the model is the base, bit for bit."""
    toy = TOYS[name]
    adapters = adapters_for(*toy)
    each = {path: 0.3 + i for i, path in enumerate(adapters)}
    apply = jax.jit(lambda a, strength: jlora.lora(toy.fn)(jlora.attach(toy.params, a, strength=strength), toy.x))

    def scaled(by: Any) -> Any:
        return {path: dataclasses.replace(f, b=f.b * by[path]) for path, f in adapters.items()}

    assert_close(apply(adapters, each), apply(scaled(each), None))
    assert_close(apply(adapters, 0.7), apply(scaled(dict.fromkeys(adapters, 0.7)), None))
    assert_close(apply(adapters, 1.0), apply(adapters, None))
    silent = jlora.lora(toy.fn)(jlora.attach(toy.params, adapters, strength=0.0), toy.x)
    np.testing.assert_array_equal(silent, toy.fn(toy.params, toy.x))


def test_strength_has_a_gradient() -> None:
    """d/ds at s = 1 is the slope along B."""
    adapters = adapters_for(mlp, MLP.params, MLP.x)

    def loss(strength: Any, adapters: Any) -> Any:
        return loss_of(jlora.lora(mlp)(jlora.attach(MLP.params, adapters, strength=strength), MLP.x))

    slope, grads = jax.jit(jax.grad(loss, (0, 1)))(1.0, adapters)
    assert_close(slope, sum(jnp.vdot(grads[path].b, f.b) for path, f in adapters.items()))


@pytest.mark.parametrize("strength", [0.5, "array", "each"])
def test_an_attached_tree_can_be_donated(strength: Any) -> None:
    """Its leaves are arrays of their own: none is given to XLA twice, and the caller's strength is not given away."""
    one = jnp.float32(0.5)
    params = jax.tree.map(jnp.copy, MLP.params)
    adapters = jax.tree.map(jnp.copy, adapters_for(mlp, params, MLP.x, dropout=0.5))
    adapters["bias"] = jnp.copy(params["bias"])
    given = {0.5: 0.5, "array": one, "each": dict.fromkeys(["w0", "w1"], one)}[strength]
    tree = jlora.attach(params, adapters, strength=given, dropout_key=jax.random.key(0))
    expected = jlora.lora(mlp)(tree, MLP.x)
    step = jax.jit(lambda tree, x: (jlora.lora(mlp)(tree, x), tree), donate_argnums=0)
    got, _ = step(tree, MLP.x)
    assert_close(got, expected)
    assert float(one) == 0.5


def test_fresh_and_merged_arrays_are_nobody_elses() -> None:
    """init copies what it trains whole, merge what was trained whole: either may be donated beside its origin."""
    config = jlora.LoraConfig(rank=2, targets=("w0",), train_also=("bias",))
    for run in (lambda f: f, jax.jit):
        adapters = run(lambda p: jlora.init(jax.random.key(0), p, config, jlora.trace(mlp, p, MLP.x)))(MLP.params)
        merged = run(jlora.merge)(MLP.params, adapters)
        changed = [merged["w0"], merged["bias"]]
        owners = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((MLP.params, adapters, changed))]
        assert len(set(owners)) == len(owners)


@pytest.mark.parametrize("factors", ["bfloat16", "float16"])
def test_scale_and_strength_do_not_round_narrow_factors(factors: str) -> None:
    """The update is scaled in float32, whatever dtype the adapters have; their gradients come back in that dtype."""
    keys = jax.random.split(KEY, 4)
    w, x = jax.random.normal(keys[0], (64, 48)), jax.random.normal(keys[1], (16, 64))
    a, b = (jax.random.normal(k, s).astype(factors) for k, s in zip(keys[2:], ((64, 4), (4, 48)), strict=True))
    moved = lambda p, x: x @ (1.1 * jnp.where(True, p["w"], 0) * jnp.arange(48.0) / 7)  # noqa: E731
    for fn, by in ((dense, 1.0), (moved, 1.1 * np.arange(48.0) / 7)):
        adapters = {"w": jlora.LoraFactors(a, b, scale=6 / 4)}  # r=4, alpha=6

        def run(adapters: Any, fn: Any = fn) -> Any:
            return jlora.lora(fn, materialize="error")(jlora.attach({"w": w}, adapters, strength=0.7), x)

        updates = 1.5 * 0.7 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        exact = np.asarray(x, np.float64) @ ((np.asarray(w, np.float64) + updates) * by)
        np.testing.assert_allclose(jax.jit(run)(adapters), exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())
        grads = jax.grad(lambda adapters: loss_of(run(adapters)))(adapters)
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(factors)}


# Dropout.

RATE = 0.25
KEY = jax.random.key(7)
ONES = jnp.ones((64, 32))


def masks(fn: Any, *names: str, shape: tuple[int, ...] = (32, 32), key: Any = KEY, x: Any = ONES) -> Any:
    """What is left of inputs of 1 on their way through adapters that are the identity, on a base of zeros."""
    params = {name: jnp.zeros(shape) for name in names}
    tree = jlora.attach(params, identity_adapters(params, dropout=RATE), dropout_key=key)
    return jlora.lora(fn, materialize="error")(tree, x)


def unlike(*kept: Any) -> bool:
    """Whether these masks are independent of each other, as far as one can see."""
    flat = [np.asarray(m).ravel() > 0 for m in kept]
    same = [np.mean(a == b) for i, a in enumerate(flat) for b in flat[:i]]
    chance = (1 - RATE) ** 2 + RATE**2
    return all(abs(s - chance) < 5 * np.sqrt(chance / flat[0].size) for s in same)


def dense(params: Any, x: Any) -> Any:
    return x @ params["w"]


def test_dropout_has_its_rate() -> None:
    """The adapter's input is zero at the rate, and scaled by 1 / (1 - rate) where it is not."""
    kept = np.asarray(masks(dense, "w"))
    np.testing.assert_allclose(kept[kept > 0], 1 / (1 - RATE), rtol=1e-6)
    assert abs(np.mean(kept == 0) - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / kept.size)


def test_dropout_acts_on_the_adapter_alone_and_with_a_key() -> None:
    """The base sees every input; without a key nothing is dropped; a rate of 0 needs no key."""
    params, adapters = MLP.params, adapters_for(mlp, MLP.params, MLP.x, dropout=RATE)
    apply = jlora.lora(mlp)
    merged = mlp(jlora.merge(params, adapters), MLP.x)
    assert_close(apply(jlora.attach(params, adapters), MLP.x), merged)
    silent = jax.tree.map(jnp.zeros_like, adapters)
    assert_close(apply(jlora.attach(params, silent, dropout_key=KEY), MLP.x), mlp(params, MLP.x))
    never = {path: dataclasses.replace(f, dropout=0.0) for path, f in adapters.items()}
    assert_close(apply(jlora.attach(params, never, dropout_key=KEY), MLP.x), merged)


def test_dropout_is_a_function_of_key_and_path() -> None:
    """The same key drops the same; another key, or another path, does not; what else is adapted does not matter."""
    both = lambda p, x: (x @ p["u"], x @ p["w"])  # noqa: E731
    u, w = masks(both, "u", "w")
    np.testing.assert_array_equal(w, masks(dense, "w"))
    np.testing.assert_array_equal(w, masks(dense, "w", key=jax.random.key_data(KEY)))
    np.testing.assert_array_equal(w, jax.jit(lambda key: masks(dense, "w", key=key))(KEY))
    assert unlike(u, w, masks(dense, "w", key=jax.random.key(8)))


def test_dropout_differs_in_every_layer() -> None:
    """Layers drop different entries, whether a loop, a scan or an index reaches them."""

    def by_scan(params: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (h, h @ w), x, params["w"])[1]

    def by_map(params: Any, x: Any) -> Any:
        return lax.map(lambda w: x @ w, params["w"])

    def by_index(params: Any, x: Any) -> Any:
        return jnp.stack([x @ params["w"][i] for i in range(3)])

    def by_loop(params: Any, x: Any) -> Any:
        start = jnp.zeros((3, *x.shape))
        return lax.fori_loop(0, 3, lambda i, ys: ys.at[i].set(x @ params["w"][i]), start)

    for layers in (by_scan, by_map, by_index, by_loop):
        assert unlike(*masks(layers, "w", shape=(3, 32, 32)))


USES: dict[str, Any] = {
    "twice": lambda p, x: (x @ p["w"], x @ p["w"], x @ p["w"]),
    "transposed": lambda p, x: (x @ p["w"], x @ p["w"].T),
    "in a call": lambda p, x: (x @ p["w"], jax.jit(dense)(p, x), jax.checkpoint(dense)(p, x)),
    "in one function": lambda p, x: [jax.jit(dense)(p, x) for _ in range(2)],
    "in a branch": lambda p, x: (x @ p["w"], lax.cond(x.sum() > 0, dense, lambda p, x: -dense(p, x), p, x)),
    "in a scan": lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 3)[1],
    "in a scan's carry": lambda p, x: lax.scan(lambda c, _: (c, x @ c["w"]), p, None, 3)[1],
    "in a map": lambda p, x: lax.map(lambda x: x @ p["w"], jnp.stack([x, x])),
    "twice in a scan": lambda p, x: jnp.concatenate(
        lax.scan(lambda c, _: (c, (x @ p["w"], x @ p["w"])), 0, None, 2)[1]
    ),
    "in two scans": lambda p, x: jnp.concatenate(
        [lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 2)[1] for _ in range(2)]
    ),
    "in a scan of scans": lambda p, x: lax.scan(
        lambda c, _: (c, lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 2)[1]), 0, None, 2
    )[1].reshape(4, *x.shape),
    "in a while loop": lambda p, x: lax.fori_loop(
        0, x[0, 0].astype(int) + 2, lambda i, ys: ys.at[i].set(x @ p["w"]), jnp.zeros((3, 64, 32))
    ),
    "in vmap": lambda p, x: jax.vmap(lambda x: x @ p["w"])(jnp.stack([x, x])),
    "in a stack": lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x]), jnp.stack([p["w"], p["v"]])),
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", USES)
def test_every_use_of_a_weight_drops_entries_of_its_own(name: str) -> None:
    """A weight that is used twice, or at every step of a loop, drops other entries each time, and the same at a call
    with the same key; JAX's own checker finds no key used twice."""
    names = ("w", "v") if name == "in a stack" else ("w",)
    with jax.debug_key_reuse(True):
        first = masks(USES[name], *names)
        again = jax.jit(lambda key: masks(USES[name], *names, key=key))(KEY)
    assert unlike(*first)
    chex.assert_trees_all_equal(first, again)


def test_devices_drop_entries_of_their_own() -> None:
    """Inside shard_map, whether the model's or the caller's, each device has masks for its own rows."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(dense, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
    ones = jnp.ones((512, 32))
    assert unlike(*np.split(np.asarray(masks(split, "w", x=ones)), 8))
    outside = jax.shard_map(
        lambda key, x: masks(dense, "w", key=key, x=x), mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows")
    )
    assert unlike(*np.split(np.asarray(outside(KEY, ones)), 8))


def test_dropout_differs_in_every_expert() -> None:
    """Experts with inputs of their own drop different entries; where all see one input, it is dropped once."""
    x = jnp.ones((3, 64, 32))
    own = masks(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), "w", shape=(3, 32, 32), x=x)
    assert unlike(*own)
    shared = masks(lambda p, x: jnp.einsum("bi,eio->ebo", x, p["w"]), "w", shape=(3, 32, 32))
    np.testing.assert_array_equal(shared[0], shared[1])


def test_dropout_under_vmap() -> None:
    """vmap maps one key to one mask: the caller folds the index in, and gets what a loop gets."""
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(3))
    mapped = jax.vmap(lambda key: masks(dense, "w", key=key))(keys)
    np.testing.assert_array_equal(mapped, jnp.stack([masks(dense, "w", key=key) for key in keys]))
    assert unlike(*mapped)


def test_dropout_is_drawn_again_alike() -> None:
    """A rematerialized block drops in the backward pass what it dropped in the forward pass."""
    params, adapters = MLP.params, adapters_for(mlp, MLP.params, MLP.x, dropout=RATE)

    def grads(fn: Any) -> Any:
        apply = jlora.lora(fn, materialize="error")
        return jax.jit(jax.grad(lambda a: loss_of(apply(jlora.attach(params, a, dropout_key=KEY), MLP.x))))(adapters)

    assert_close(grads(jax.checkpoint(mlp)), grads(mlp))

    def shared(params: Any, x: Any, wrap: Any) -> Any:
        body = wrap(lambda h, _: (mlp(params, mlp(params, h)), 0))
        return lax.scan(body, x, None, 3)[0]

    assert_close(grads(lambda p, x: shared(p, x, jax.checkpoint)), grads(lambda p, x: shared(p, x, lambda body: body)))


def test_lookups_are_not_dropped() -> None:
    """A table that is looked up gives whole rows; its use as an output projection drops."""
    toy = TOYS["tied"]
    adapters = adapters_for(*toy, dropout=RATE)
    tree = jlora.attach(toy.params, adapters, dropout_key=KEY)
    lookup = lambda p, ids: p["table"][ids]  # noqa: E731
    merged = jlora.merge(toy.params, adapters)
    assert_close(jlora.lora(lookup)(tree, toy.x), lookup(merged, toy.x))
    assert not np.allclose(jlora.lora(toy.fn)(tree, toy.x), toy.fn(merged, toy.x))
