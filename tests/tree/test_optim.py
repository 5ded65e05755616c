"""Law 4: only trainable leaves change, under any optimizer; and the labels and masks that optax gets."""

from __future__ import annotations

import collections
import dataclasses
from types import MappingProxyType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze as freeze_dict
from haiku.data_structures import to_immutable_dict as FlatMap

import jlora
from tests.toys import assert_close

KEY = jax.random.key(0)
PARAMS = {
    "in": jax.random.normal(KEY, (5, 7)),
    "out": jax.random.normal(KEY, (7, 3)),
    "bias": jnp.zeros(3),
    "frozen": jnp.ones((3, 3)),
}
CONFIG = jlora.LoraConfig(rank=2, targets=("in", "out"), train_also=("bias",), use_dora=True)
X = jax.random.normal(jax.random.fold_in(KEY, 1), (11, 5))


def model(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["in"]) @ params["out"] @ params["frozen"] + params["bias"]


APPLY = jlora.lora(model, frozen_gradients=True)  # so that there is something to be frozen


def loss(tree: Any) -> Any:
    return jnp.mean(jnp.square(APPLY(tree, X) - 1.0))


@pytest.fixture(scope="module")
def adapters() -> Any:
    return jlora.init(KEY, PARAMS, CONFIG)


@pytest.fixture(scope="module")
def tree(adapters: Any) -> Any:
    return jlora.attach(PARAMS, adapters)


OPTIMIZERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "sgd": optax.sgd(0.01, momentum=0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "lion": optax.lion(0.01, weight_decay=0.5),
    "adafactor": optax.adafactor(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_only_trainables_move_and_as_if_they_were_alone(name: str, adapters: Any, tree: Any) -> None:
    """Training a whole tree with freeze(tx), from the gradients of every leaf, updates the adapters exactly as training
    them alone with tx does; frozen leaves keep every bit; the state is as large as for the adapters."""
    tx, whole = OPTIMIZERS[name], jlora.freeze(OPTIMIZERS[name])

    @jax.jit
    def both(adapters: Any, tree: Any) -> Any:
        state, whole_state = tx.init(adapters), whole.init(tree)
        for _ in range(3):
            updates, state = tx.update(jax.grad(lambda a: loss(jlora.attach(PARAMS, a)))(adapters), state, adapters)
            adapters = optax.apply_updates(adapters, updates)
            updates, whole_state = whole.update(jax.grad(loss)(tree), whole_state, tree)
            tree = optax.apply_updates(tree, updates)
        return adapters, tree, state, whole_state

    alone, moved, state, whole_state = both(adapters, tree)
    params, together = jlora.detach(moved)
    for path, leaf in PARAMS.items():
        np.testing.assert_array_equal(params[path], leaf)
    for a, b, start in zip(*map(jax.tree.leaves, (alone, together, adapters)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
        assert not np.array_equal(a, start)
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, whole_state)]
    assert sizes[0] == sizes[1]


def value_and_functions(fn: Any, value: Any, grad: Any) -> Any:
    """The extra arguments of a line search."""
    return {"value": value, "grad": grad, "value_fn": fn}


WITH_EXTRAS: dict[str, tuple[Any, Any]] = {
    "lbfgs": (optax.lbfgs(), value_and_functions),
    "backtracking": (
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        value_and_functions,
    ),
    "sam": (
        optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.01), opaque_mode=True),
        lambda fn, value, grad: {"grad_fn": lambda params, _: jax.grad(fn)(params)},
    ),
    "polyak": (optax.polyak_sgd(), lambda fn, value, grad: {"value": value}),
    "plateau": (
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
        lambda fn, value, grad: {"value": value},
    ),
}


@pytest.mark.parametrize("name", sorted(WITH_EXTRAS))
def test_functions_and_gradients_given_to_an_update_are_of_the_whole_tree(name: str, adapters: Any, tree: Any) -> None:
    """freeze(tx) takes value, grad and functions of the whole tree, and moves the adapters as tx moves them alone."""
    tx, extra = WITH_EXTRAS[name]

    def train(tx: Any, fn: Any, params: Any) -> Any:
        state = tx.init(params)
        for _ in range(2):
            value, grad = jax.value_and_grad(fn)(params)
            updates, state = tx.update(grad, state, params, **extra(fn, value, grad))
            params = optax.apply_updates(params, updates)
        return params

    alone = jax.jit(lambda a: train(tx, lambda a: loss(jlora.attach(PARAMS, a)), a))(adapters)
    params, together = jlora.detach(jax.jit(lambda t: train(jlora.freeze(tx), loss, t))(tree))
    assert_close(together, alone)
    chex.assert_trees_all_equal(params, PARAMS)
    assert any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (alone, adapters)), strict=True))


def test_schedule_free_reads_its_state_beside_the_trainable_part(adapters: Any, tree: Any) -> None:
    """The averaged parameters of a whole tree are those of the adapters alone, taken from partition(tree)[0]."""
    tx = optax.contrib.schedule_free_adamw(0.1)
    whole = jlora.freeze(tx)
    state, whole_state = tx.init(adapters), whole.init(tree)
    updates, state = tx.update(jax.grad(lambda a: loss(jlora.attach(PARAMS, a)))(adapters), state, adapters)
    alone = optax.contrib.schedule_free_eval_params(state, optax.apply_updates(adapters, updates))
    updates, whole_state = whole.update(jax.grad(loss)(tree), whole_state, tree)
    trainable, frozen = jlora.partition(optax.apply_updates(tree, updates))
    averaged: Any = optax.contrib.schedule_free_eval_params(whole_state, trainable)
    assert_close(jlora.detach(jlora.combine(averaged, frozen))[1], alone)


RATES = {"A": 1e-3, "B": 16e-3, "magnitude": 1e-3, "full": 1e-3, "frozen": 0.0}
LORA_PLUS: Any = {name: optax.adam(rate) if rate else optax.set_to_zero() for name, rate in RATES.items()}


@pytest.mark.parametrize("labels", ["function", "tree"])
@pytest.mark.parametrize("dora", [False, True])
def test_one_partition_is_for_adapters_and_for_attached_trees(labels: str, dora: bool) -> None:
    """LoRA+ with a transformation for every label: Adam's first step is the rate of the label, and 0 where frozen."""
    fresh = jlora.init(KEY, PARAMS, dataclasses.replace(CONFIG, use_dora=dora))
    trees: Any = (fresh, jlora.attach(PARAMS, fresh))
    for tree in trees:
        names = jlora.labels(tree)
        tx = optax.partition(LORA_PLUS, jlora.labels if labels == "function" else names)
        state = tx.init(tree)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), state, tree)
        jax.tree.map(lambda u, name: np.testing.assert_allclose(u, -RATES[name], rtol=1e-5), updates, names)
        trainable = sum(x.size for x in jax.tree.leaves(fresh))
        assert sum(x.size for x in jax.tree.leaves(state)) == 2 * trainable + 4  # two moments, and four counts


@pytest.mark.parametrize("name", ["freeze", "partition", "partition of adapters"])
def test_states_are_mapped_beside_the_trainable_part(name: str, adapters: Any, tree: Any) -> None:
    """tree_map_params finds the copies of the parameters in the state, and takes trees like the trainable part."""
    if name == "freeze":
        tx, params, rest = jlora.freeze(optax.adam(0.1)), tree, [jlora.partition(tree)[0]]
    else:
        tx, params, rest = optax.partition(LORA_PLUS, jlora.labels), tree if name == "partition" else adapters, []
    state = tx.init(params)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda x, *like: [y.shape for y in like] + [x.shape], state, *rest, transform_non_params=lambda _: None
    )
    moments = [x for x in jax.tree.leaves(mapped, is_leaf=lambda x: isinstance(x, list)) if isinstance(x, list)]
    assert len(moments) == 2 * len(jax.tree.leaves(adapters))
    assert all(len(shapes) == 1 + len(rest) and len(set(shapes)) == 1 for shapes in moments)


@pytest.mark.parametrize("kind", [collections.OrderedDict, MappingProxyType, freeze_dict, nnx.State, FlatMap])
def test_labels_know_adapters_in_any_mapping(kind: Any, adapters: Any) -> None:
    """The same labels in the same kind of Mapping, whether JAX knows it as a tree or not."""
    names = jlora.labels(kind(adapters))
    assert type(names) is type(kind(adapters))
    assert jax.tree.structure(names) == jax.tree.structure(kind(adapters)) or kind is MappingProxyType
    assert {path: (v.a, v.b, v.magnitude) if path != "bias" else v for path, v in names.items()} == {
        "in": ("A", "B", "magnitude"),
        "out": ("A", "B", "magnitude"),
        "bias": "full",
    }


def test_holes_in_the_gradient_are_accepted(tree: Any) -> None:
    """With gradients of the trainable part alone (None for the rest), freeze gives the same updates."""
    tx = jlora.freeze(optax.adam(0.1))
    trainable, frozen = jlora.partition(tree)
    full = jax.grad(loss)(tree)
    holes = jax.grad(lambda t: loss(jlora.combine(t, frozen)))(trainable)
    state = tx.init(tree)
    for a, b in zip(*(jax.tree.leaves(tx.update(g, state, tree)[0]) for g in (full, holes)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    alone = tx.update(holes, state, trainable)[0]
    for a, b in zip(*map(jax.tree.leaves, (alone, jlora.partition(tx.update(full, state, tree)[0])[0])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_partition_and_combine_are_inverses(tree: Any) -> None:
    """combine(*partition(t)) == t, leaf by leaf; each half has None exactly where the other has its leaves."""
    trainable, frozen = jlora.partition(tree)
    again = jlora.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, tree)), strict=True))
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(jlora.detach(tree)[1]))
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(tree))


def test_labels_name_every_leaf(adapters: Any, tree: Any) -> None:
    """Labels have the tree's structure; frozen exactly where the mask is False; adapters alone have none frozen."""
    names, mask = jlora.labels(tree), jlora.trainable_mask(tree)
    assert jax.tree.structure(names) == jax.tree.structure(tree) == jax.tree.structure(mask)
    assert [n != "frozen" for n in jax.tree.leaves(names)] == jax.tree.leaves(mask)
    assert sorted(set(jax.tree.leaves(names))) == ["A", "B", "frozen", "full", "magnitude"]
    assert jax.tree.structure(jlora.labels(adapters)) == jax.tree.structure(adapters)
    assert sorted(jax.tree.leaves(jlora.labels(adapters))) == ["A", "A", "B", "B", "full", "magnitude", "magnitude"]


def test_adam_does_not_see_the_scale_of_the_factors() -> None:
    """Law 8, Adam invariance: A times p and B times q, with learning rates scaled alike, give the same trajectory."""
    params = {"in": PARAMS["in"]}
    start = jlora.init(KEY, params, jlora.LoraConfig(rank=2, targets=("in",)))["in"]
    assert isinstance(start, jlora.LoraFactors)
    first = {"in": jlora.LoraFactors(start.a, start.b + 0.1, scale=1.0, axes=start.axes)}
    p, q = 4.0, 0.5

    def train(adapters: Any, rate_a: float, rate_b: float) -> Any:
        rates: dict[Any, Any] = {"A": optax.adam(rate_a, eps=0.0), "B": optax.adam(rate_b, eps=0.0)}
        tx = optax.partition(rates, jlora.labels(adapters))

        def step(carry: Any, _: Any) -> Any:
            adapters, state = carry

            def error(a: Any) -> Any:
                return jnp.mean(jnp.square(jlora.lora(lambda p, x: x @ p["in"])(jlora.attach(params, a), X) - 1))

            value, grads = jax.value_and_grad(error)(adapters)
            updates, state = tx.update(grads, state, adapters)
            return (optax.apply_updates(adapters, updates), state), value

        return jax.lax.scan(step, (adapters, tx.init(adapters)), length=10)[1]

    f = first["in"]
    second = {"in": jlora.LoraFactors(f.a * p, f.b * q, scale=1 / (p * q), axes=f.axes)}
    np.testing.assert_allclose(train(first, 0.02, 0.02), train(second, 0.02 * p, 0.02 * q), rtol=1e-4)
