"""The adapted model as JAX runs it: with and without jit, under pmap, and traced once however often it is called."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from absl.testing import parameterized

import jlora
from tests.toys import TOYS, adapters_for, assert_close, loss_of


class Variants(chex.TestCase):
    @chex.variants(  # pyright: ignore[reportCallIssue]
        with_jit=True, without_jit=True, with_device=True, without_device=True, with_pmap=True
    )
    @parameterized.named_parameters((name, name) for name in TOYS)
    def test_the_adapted_model_is_the_merged_model(self, name: str) -> None:
        toy = TOYS[name]
        adapters = adapters_for(toy.fn, toy.params, toy.x)
        apply = self.variant(jlora.lora(toy.fn, materialize="error"))
        merged = self.variant(toy.fn)
        assert_close(apply(jlora.attach(toy.params, adapters), toy.x), merged(jlora.merge(toy.params, adapters), toy.x))


def test_a_training_step_is_traced_once() -> None:
    """For new adapters, batches and dropout keys, and for adapters attached and detached between the steps."""
    toy = TOYS["mlp"]
    config = jlora.LoraConfig(rank=2, targets=("w",), exclude=(), dropout=0.1)
    adapters: Any = jlora.init(jax.random.key(0), toy.params, config, jlora.trace(toy.fn, toy.params, toy.x))
    apply, tx = jlora.lora(toy.fn), optax.adamw(1e-3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(adapters: Any, state: Any, x: Any, key: Any) -> Any:
        def loss(adapters: Any) -> Any:
            return loss_of(apply(jlora.attach(toy.params, adapters, dropout_key=key), x))

        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    chex.clear_trace_counter()
    state = tx.init(adapters)
    for i in range(3):
        adapters, state = step(adapters, state, toy.x + i, jax.random.key(i))
        _, adapters = jlora.detach(jlora.attach(toy.params, adapters))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(adapters))
