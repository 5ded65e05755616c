"""One training step, a pure function: (state, base, batch, key) → (state, metrics).

The state holds what is trained and nothing more. The base comes in as its own argument: it is never differentiated,
never updated and has no optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from train.batches import Batch
from train.networks import Forward
from train.tasks import Task

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      step: int32 scalar, the number of updates so far.
      adapters: all that is trained, as `jlora.init` gives it.
      opt_state: of the optimizer, for the trainable leaves alone.
    """

    step: jax.Array
    adapters: dict[str, Any]
    opt_state: optax.OptState


def init_state(tx: optax.GradientTransformation, base: Any, adapters: dict[str, Any], key: jax.Array) -> TrainState:
    """The state before the first step; ``tx`` and ``key`` are those of the step."""
    opt_state = tx.init(jlora.attach(base, adapters, dropout_key=key))
    return TrainState(jnp.zeros((), jnp.int32), adapters, opt_state)


def make_step(
    forward: Forward, task: Task, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The step that trains the adapters of any model.

    Args:
      forward: the bare model, ``forward(params, inputs, key) -> outputs``.
      task: which part of a batch are its inputs, and the loss.
      tx: a transformation over the whole attached tree that leaves frozen leaves alone: `jlora.freeze` of an optimizer.
      schedule: the optimizer's learning rate, for the metrics.

    Returns:
      ``step(state, base, batch, key) -> (state, metrics)``, to be jitted; the key is for dropout, one for the whole
      training. The metrics are scalars: ``loss`` (mean of the batch), ``grad_norm``, ``learning_rate``.
    """
    apply = jlora.lora(forward)

    def step(state: TrainState, base: Any, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        adapters_key, network_key = jax.random.split(jax.random.fold_in(key, state.step))
        tree = jlora.attach(base, state.adapters, dropout_key=adapters_key)
        trainable, frozen = jlora.partition(tree)

        def loss_fn(trainable: Any) -> jax.Array:
            outputs = apply(jlora.combine(trainable, frozen), task.inputs(batch), network_key)
            total, count = task.loss(outputs, batch)
            return total / jnp.maximum(count, 1)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, state.opt_state, tree)
        _, adapters = jlora.detach(jlora.combine(optax.apply_updates(trainable, updates), frozen))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        return TrainState(state.step + 1, adapters, opt_state), metrics

    return step
