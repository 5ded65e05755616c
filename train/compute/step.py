"""One training step, a pure function: (state, base, batch, key) → (state, metrics).

The state holds only what is trained. The base is a separate argument: it is never differentiated, never updated and has
no optimizer state. A loss is a sum and a count, so the result does not depend on how a batch is split over devices or
into accumulated parts: each part gives its mean and its count, which weights the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora import optim
from train.data.batches import Batch
from train.networks.network import Forward
from train.tasks.base import Task

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The state that a step updates.

    Attributes:
      step: int32 scalar, the number of updates so far.
      adapters: everything that is trained, as from `jlora.init`.
      opt_state: the optimizer's state for the adapters.
    """

    step: jax.Array
    adapters: dict[str, Any]
    opt_state: optax.OptState


Step = Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, Metrics]]


def init_state(tx: optax.GradientTransformation, adapters: dict[str, Any]) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), adapters, tx.init(adapters))


def make_step(
    forward: Forward,
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    smoothing: float = 0.0,
    accumulate: int = 1,
    axis: str | None = None,
    freeze_a: bool = False,
    strength: Mapping[str, jax.Array] | None = None,
) -> Step:
    """A step that trains the adapters of any model.

    Args:
      forward: the bare model, ``forward(params, inputs, key) -> outputs``.
      task: selects the inputs of a batch, and computes the loss.
      tx: the optimizer without its learning rate, see `train.compute.optimizer.make_optimizer`.
      schedule: the learning rate by the number of updates so far.
      smoothing: label smoothing.
      accumulate: number of parts of the batch, computed one after the other; it divides the rows.
      axis: the mapped axis (`jax.pmap`, `jax.shard_map`) of devices with different rows; None if the batch is one
        array, sharded or not.
      freeze_a: whether A has no gradient, as under LoRA-FA: the inputs of adapted weights are then not kept.
      strength: of the adapters, by path, see `jlora.attach`.

    Returns:
      ``step(state, base, batch, key) -> (state, metrics)``, to be compiled. The key is for dropout, and the same in
      every step. The metrics are float32 scalars: ``loss`` (mean of the batch), ``grad_norm``, ``learning_rate``.
    """
    apply = jlora.lora(forward)

    def loss_fn(adapters: Any, base: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        adapters_key, network_key = jax.random.split(key)
        adapters = optim.frozen_a(adapters) if freeze_a else adapters
        tree = jlora.attach(base, adapters, strength=strength, dropout_key=adapters_key, split_inputs={})
        outputs = apply(tree, task.inputs(batch, smoothing), network_key)
        total, count = task.loss(outputs, batch, smoothing)
        return _mean(total, count), count

    def weighted(adapters: Any, base: Any, batch: Batch, key: jax.Array) -> tuple[Any, jax.Array]:
        """Loss and gradient of a part, weighted by its count, in float32; and the count."""
        (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapters, base, batch, key)
        return jax.tree.map(lambda x: x.astype(jnp.float32) * count, (loss, grads)), count

    def accumulated(adapters: Any, base: Any, batch: Batch, key: jax.Array) -> tuple[Any, jax.Array]:
        """The sum of `weighted` over the parts."""
        if accumulate == 1:
            return weighted(adapters, base, batch, key)

        def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            found = weighted(adapters, base, part[1], jax.random.fold_in(key, part[0]))
            return jax.tree.map(jnp.add, total, found), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (adapters, jnp.float32(0)))
        start = ((zeros[1], zeros[0]), zeros[1])
        parts = jnp.arange(accumulate), jax.tree.map(lambda x: _divided(x, accumulate), dict(batch))
        return jax.lax.scan(add, start, parts)[0]

    def step(state: TrainState, base: Any, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        found = accumulated(state.adapters, base, batch, key)
        sums, count = found if axis is None else jax.lax.psum(found, axis)
        loss, grads = jax.tree.map(lambda x: _mean(x, count), sums)

        rate = jnp.asarray(schedule(state.step), jnp.float32)
        direction, opt_state = tx.update(grads, state.opt_state, state.adapters)
        adapters: Any = optax.apply_updates(state.adapters, optax.tree.scale(-rate, direction))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return TrainState(state.step + 1, adapters, opt_state), metrics

    return step


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """``total / count``, or 0 if the count is 0. A weighted count may be less than 1."""
    return total / jnp.where(count > 0, count, 1)


def _divided(rows: jax.Array, parts: int) -> jax.Array:
    """[rows, ...] to [parts, rows / parts, ...]; parts take every ``parts``-th row: rows stay on their device."""
    return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
