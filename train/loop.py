"""Epochs of steps, with a measurement on the way."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from train import report
from train.batches import Examples, size, training_batches
from train.config import ConfigError, FitConfig
from train.networks import Forward
from train.optim import make_optimizer, make_schedule
from train.step import init_state, make_step
from train.tasks import Task

Record = dict[str, Any]


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key for one purpose of a run. Purposes do not share randomness, and a new one does not change the others."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def fit(
    forward: Forward,
    task: Task,
    base: Any,
    adapters: dict[str, Any],
    examples: Examples,
    config: FitConfig,
    *,
    phase: str,
    learning_rate: float,
    seed: int,
    eval_every: int,
    evaluate: Callable[[Any], dict[str, float]],
    log: Callable[[Record], None],
    buckets: Sequence[int] = (),
    on_eval: Callable[[Record, dict[str, Any]], None] = lambda record, adapters: None,
) -> tuple[dict[str, Any], list[Record]]:
    """Train ``adapters`` on ``examples``; ``base`` stays as it is.

    Args:
      phase: name of this training, in records and on the progress bar.
      evaluate: takes an attached tree and returns figures for the record; called every ``eval_every`` epochs and at
        the end.
      log: called with the record of each epoch as soon as it ends.
      buckets: the lengths to which batches are padded.
      on_eval: called after each measurement with its record and the adapters that were measured.

    Returns:
      The trained adapters, and the records. A record holds phase, epoch, step, seconds, the step's metrics averaged
      over the epoch, and what ``evaluate`` returned.
    """
    steps_per_epoch = size(examples) // config.batch_size
    steps = config.epochs * steps_per_epoch
    schedule = make_schedule(config, learning_rate, steps)
    tx = jlora.freeze(make_optimizer(config, schedule))
    key = random_key(seed, f"{phase} dropout")
    step = jax.jit(make_step(forward, task, tx, schedule), donate_argnums=0)
    # The step reuses the state's memory; the caller's adapters are not ours to give away.
    state = init_state(tx, base, jax.tree.map(jnp.copy, adapters), key)

    records = []
    started = time.perf_counter()
    with report.Progress(phase, steps, task.primary) as progress:
        for epoch in range(1, config.epochs + 1):
            # The metrics stay on the device until the epoch ends, so that no step waits for the one before it.
            metrics = []
            for batch in training_batches(examples, config.batch_size, seed, epoch, buckets):
                state, measured = step(state, base, batch, key)
                metrics.append(measured)
                progress.advance()
            record: Record = {"phase": phase, "epoch": epoch, "step": epoch * steps_per_epoch}
            metrics = jax.device_get(metrics)
            if bad := [i for i, m in enumerate(metrics) if not np.isfinite(m["loss"])]:
                raise ConfigError(
                    f"{phase}: the loss is {metrics[bad[0]]['loss']} in step {bad[0] + 1} of epoch {epoch}; the "
                    "training diverged. Pass a smaller --learning-rate, more --fit.warmup or --fit.clip 1.0"
                )
            record |= {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
            measured_now = epoch % eval_every == 0 or epoch == config.epochs
            if measured_now:
                record |= evaluate(jlora.attach(base, state.adapters))
            record["seconds"] = round(time.perf_counter() - started, 3)
            records.append(record)
            log(record)
            progress.show(record)
            if measured_now:
                on_eval(record, state.adapters)
    return state.adapters, records
