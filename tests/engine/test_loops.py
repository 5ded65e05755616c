"""docs/loops.md is true: its blocks run as one program, and what it warns of does happen."""

from __future__ import annotations

import re
from pathlib import Path
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
from tests.messages import expect, message
from tests.toys import assert_close

DOC = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """The names that the document's program defines."""
    names: dict[str, Any] = {}
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)):
        exec(compile(code, f"docs/loops.md, block {i + 1}", "exec"), names)
    return names


def first_step(loss: Any, adapters: Any, tx: Any) -> Any:
    """The adapters after one step alone."""
    updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
    return optax.apply_updates(adapters, updates)


def test_equinox_modules_train_as_their_adapters_alone(ran: dict[str, Any]) -> None:
    """freeze on a module that holds functions updates its adapters alone, as without the module."""
    module, adapters = ran["module"], ran["adapters"]
    base, moved = jlora.detach(ran["trained"])
    alone = first_step(lambda a: ran["module_loss"](jlora.attach(module, a)), adapters, optax.adamw(1e-2))
    assert_close(moved, alone)
    assert eqx.tree_equal(base, module)
    assert base.activation is module.activation


def test_labels_of_a_module_that_optax_calls_are_named(ran: dict[str, Any]) -> None:
    """optax mistakes the labels of a callable module for a function; the message says what to pass."""
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    transforms: Any = {name: optax.set_to_zero() for name in ("A", "B", "frozen")}
    for tree in (ran["attached"], jlora.attach(linear, ran["start"])):
        labels = jlora.labels(tree)
        text = message(TypeError, lambda labels=labels, tree=tree: optax.partition(transforms, labels).init(tree))
        expect(text, "jlora.labels", "`jlora.labels` itself", "weight" if tree is ran["attached"] else "kernel")
        optax.partition(transforms, jlora.labels).init(eqx.filter(tree, eqx.is_array))


def test_nnx_optimizers_move_adapters_that_are_parameters(ran: dict[str, Any]) -> None:
    """The updates are those of optax on the adapters alone, in every form in the document."""
    start, params, apply, x, y = (ran[n] for n in ("start", "params", "nnx_apply", "x", "y"))

    def loss(adapters: Any) -> Any:
        return jnp.mean((apply(jlora.attach(params, adapters), x) - y) ** 2)

    alone = first_step(loss, start, optax.adamw(1e-2))
    assert_close(ran["loss_mask"], alone)
    holder = nnx.Dict(adapters=nnx.data(jax.tree.map(nnx.Param, start)))
    both = nnx.ModelAndOptimizer(holder, optax.adamw(1e-2), wrt=nnx.Param)
    both.update(nnx.grad(lambda m: loss(nnx.as_pure(m.adapters)))(holder))
    assert_close(nnx.as_pure(holder.adapters), alone)
    tree = jlora.attach(params, start)
    whole = nnx.Optimizer(tree, jlora.freeze(optax.adamw(1e-2)), wrt=nnx.Param)
    whole.update(tree, jax.grad(lambda t: jnp.mean((apply(t, x) - y) ** 2))(tree))
    assert_close(jlora.detach(tree)[1], alone)
    blind = nnx.Optimizer(start, optax.adamw(1e-2), wrt=nnx.Param)
    assert not jax.tree.leaves(nnx.state(blind.opt_state[0].mu))  # what the document warns of
    text = message(ValueError, lambda: nnx.Optimizer(start, jlora.freeze(optax.adamw(1e-2)), wrt=nnx.Param))
    expect(text, "none of the 0 leaves is trainable")


def test_a_merged_nnx_model_of_its_own_leaves_the_base(ran: dict[str, Any]) -> None:
    """The document's form keeps the params; nnx.update on their own model overwrites them; other leaves are shared."""
    graphdef, params, x = (ran[name] for name in ("graphdef", "params", "x"))
    learnt = jax.tree.map(lambda a: a + 0.1, ran["loss_mask"])
    before = jax.tree.map(np.array, params)
    merged: Any = jlora.merge(params, learnt)
    served = nnx.merge(graphdef, merged)
    assert_close(served(x), ran["nnx_apply"](jlora.attach(params, learnt), x))
    chex.assert_trees_all_equal(nnx.to_pure_dict(params), nnx.to_pure_dict(before))
    assert served.bias.get_value() is params["bias"].get_value()
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    own: Any = nnx.split(other)[1]
    nnx.update(other, jlora.merge(own, learnt))
    assert not np.array_equal(own["kernel"].get_value(), before["kernel"].get_value())


def test_donating_a_merged_tree_deletes_what_it_shares() -> None:
    """Leaves without an adapter are the very same arrays; a copy of them is not deleted."""
    params = {"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=1, targets=("w",)))
    taken = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    taken(jax.tree.map(jnp.copy, jlora.merge(params, adapters)))
    assert not params["bias"].is_deleted()
    taken(jlora.merge(params, adapters))
    assert params["bias"].is_deleted() and not params["w"].is_deleted()


def test_optimizers_of_whole_modules_move_adapters_alone(ran: dict[str, Any]) -> None:
    """L-BFGS and schedule-free over a module's arrays give what they give the adapters alone."""
    for tree in (ran["averaged"], optax.apply_updates(ran["arrays"], ran["free_step"])):
        kept = zip(*(jax.tree.leaves(jlora.partition(t)[1]) for t in (tree, ran["arrays"])), strict=True)
        assert all(np.array_equal(x, y) for x, y in kept)
    moved = jlora.detach(optax.apply_updates(ran["arrays"], ran["lbfgs_step"]))[1]

    def loss(adapters: Any) -> Any:
        return ran["module_loss"](jlora.attach(ran["module"], adapters))

    adapters = ran["adapters"]
    tx = optax.lbfgs()
    value, grad = jax.value_and_grad(loss)(adapters)
    updates, _ = tx.update(grad, tx.init(adapters), adapters, value=value, grad=grad, value_fn=loss)
    assert_close(moved, optax.apply_updates(adapters, updates))
