"""The recipes for Equinox and NNX: modules train as their adapters alone do, and the pages' warnings hold."""

from __future__ import annotations

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from tests.documents import ran as run
from tests.messages import expect, message
from tests.toys import assert_close


@pytest.fixture(scope="module")
def equinox() -> dict[str, Any]:
    """The names that the page on Equinox defines."""
    return run("docs/models/equinox.md")[0]


@pytest.fixture(scope="module")
def flax_nnx() -> dict[str, Any]:
    """The names that the page on Flax NNX defines."""
    return run("docs/models/nnx.md")[0]


def first_step(loss: Any, adapters: Any, tx: Any) -> Any:
    """The adapters after one step alone."""
    updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
    return optax.apply_updates(adapters, updates)


@pytest.mark.slow
def test_equinox_modules_train_as_their_adapters_alone(equinox: dict[str, Any]) -> None:
    """freeze on a module that holds functions moves its adapters alone, as they move by themselves."""
    module, adapters = equinox["module"], equinox["adapters"]
    base, moved = jlora.detach(equinox["trained"])
    alone = first_step(lambda a: equinox["module_loss"](jlora.attach(module, a)), adapters, optax.adamw(1e-2))
    assert_close(moved, alone)
    assert eqx.tree_equal(base, module)
    assert base.activation is module.activation


def test_labels_of_a_module_that_optax_calls_are_named(equinox: dict[str, Any]) -> None:
    """optax takes the labels of a callable module for a function; the message says what to give it."""
    linear: Any = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    start = jlora.init(jax.random.key(3), linear, jlora.LoraConfig(rank=2, targets=("kernel",)))
    transforms: Any = {name: optax.set_to_zero() for name in ("A", "B", "frozen")}
    for tree in (equinox["attached"], jlora.attach(linear, start)):
        labels = jlora.labels(tree)
        text = message(TypeError, lambda labels=labels, tree=tree: optax.partition(transforms, labels).init(tree))
        leaf = "weight" if tree is equinox["attached"] else "kernel"
        expect(text, "jlora.labels", "pass the function `jlora.labels`", leaf)
        optax.partition(transforms, jlora.labels).init(eqx.filter(tree, eqx.is_array))


@pytest.mark.slow
def test_nnx_optimizers_move_adapters_that_are_parameters(flax_nnx: dict[str, Any]) -> None:
    """As optax moves them alone, in every form that the page has; plain adapters are not seen."""
    start, params, apply, x, y = (flax_nnx[n] for n in ("adapters", "params", "apply", "x", "y"))

    def loss(adapters: Any) -> Any:
        return jnp.mean((apply(jlora.attach(params, adapters), x) - y) ** 2)

    alone = first_step(loss, start, optax.adamw(1e-2))
    assert_close(flax_nnx["trained"], alone)
    holder = nnx.Dict(adapters=nnx.data(jax.tree.map(nnx.Param, start)))
    both = nnx.ModelAndOptimizer(holder, optax.adamw(1e-2), wrt=nnx.Param)
    both.update(nnx.grad(lambda m: loss(nnx.as_pure(m.adapters)))(holder))
    assert_close(nnx.as_pure(holder.adapters), alone)
    tree = jlora.attach(params, start)
    whole = nnx.Optimizer(tree, jlora.freeze(optax.adamw(1e-2)), wrt=nnx.Param)
    whole.update(tree, jax.grad(lambda t: jnp.mean((apply(t, x) - y) ** 2))(tree))
    assert_close(jlora.detach(tree)[1], alone)
    blind = nnx.Optimizer(start, optax.adamw(1e-2), wrt=nnx.Param)
    assert not jax.tree.leaves(nnx.state(blind.opt_state[0].mu))  # what the page warns of
    text = message(ValueError, lambda: nnx.Optimizer(start, jlora.freeze(optax.adamw(1e-2)), wrt=nnx.Param))
    expect(text, "none of the 0 leaves is trainable")


def test_a_merged_nnx_model_of_its_own_leaves_the_base(flax_nnx: dict[str, Any]) -> None:
    """The page's form keeps the params; nnx.update on their own model overwrites them; other leaves are shared."""
    graphdef, params, x = (flax_nnx[name] for name in ("graphdef", "params", "x"))
    trained = jax.tree.map(lambda a: a + 0.1, flax_nnx["trained"])
    before = jax.tree.map(np.array, params)
    merged: Any = jlora.merge(params, trained)
    served = nnx.merge(graphdef, merged)
    assert_close(served(x), flax_nnx["apply"](jlora.attach(params, trained), x))
    chex.assert_trees_all_equal(nnx.to_pure_dict(params), nnx.to_pure_dict(before))
    assert served.up.bias.get_value() is params["up"]["bias"].get_value()
    other = flax_nnx["MLP"](nnx.Rngs(0))
    own: Any = nnx.split(other)[1]
    nnx.update(other, jlora.merge(own, trained))
    assert not np.array_equal(own["up"]["kernel"].get_value(), before["up"]["kernel"].get_value())


def test_donating_a_merged_tree_deletes_what_it_shares() -> None:
    """Leaves without an adapter are the very same arrays; a copy of them is not deleted."""
    params = {"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=1, targets=("w",)))
    taken = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    taken(jax.tree.map(jnp.copy, jlora.merge(params, adapters)))
    assert not params["bias"].is_deleted()
    taken(jlora.merge(params, adapters))
    assert params["bias"].is_deleted() and not params["w"].is_deleted()


def test_optimizers_of_whole_modules_move_adapters_alone(equinox: dict[str, Any]) -> None:
    """L-BFGS and schedule-free over a module's arrays give what they give the adapters alone."""
    for tree in (equinox["averaged"], optax.apply_updates(equinox["arrays"], equinox["free_step"])):
        kept = zip(*(jax.tree.leaves(jlora.partition(t)[1]) for t in (tree, equinox["arrays"])), strict=True)
        assert all(np.array_equal(x, y) for x, y in kept)
    moved = jlora.detach(optax.apply_updates(equinox["arrays"], equinox["lbfgs_step"]))[1]

    def loss(adapters: Any) -> Any:
        return equinox["module_loss"](jlora.attach(equinox["module"], adapters))

    adapters = equinox["adapters"]
    tx = optax.lbfgs()
    value, grad = jax.value_and_grad(loss)(adapters)
    updates, _ = tx.update(grad, tx.init(adapters), adapters, value=value, grad=grad, value_fn=loss)
    assert_close(moved, optax.apply_updates(adapters, updates))
