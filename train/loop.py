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

LINES = 50
"""How often a training tells its loss, at least; more often when it has more epochs."""


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
      log: called with each record as soon as there is one.
      buckets: the lengths to which batches are padded.
      on_eval: called after each measurement with its record and the adapters that were measured.

    Returns:
      The trained adapters, and the records. On the way, about `LINES` of them hold phase, step and the step's metrics,
      averaged since the last one. That of an epoch's end also holds epoch, seconds and what ``evaluate`` returned, and
      its averages are over the epoch.

    Raises:
      ConfigError: if the loss is not finite, naming the step.
    """
    steps_per_epoch = size(examples) // config.batch_size
    steps = config.epochs * steps_per_epoch
    schedule = make_schedule(config, learning_rate, steps)
    tx = jlora.freeze(make_optimizer(config, schedule))
    key = random_key(seed, f"{phase} dropout")
    step = jax.jit(make_step(forward, task, tx, schedule), donate_argnums=0)
    # The step reuses the state's memory; the caller's adapters are not ours to give away.
    state = init_state(tx, base, jax.tree.map(jnp.copy, adapters), key)

    every = max(1, min(steps_per_epoch, steps // LINES))
    records: list[Record] = []

    def note(record: Record) -> None:
        records.append(record)
        log(record)

    started = time.perf_counter()
    with report.Progress(phase, steps, task.primary) as progress:
        for epoch in range(1, config.epochs + 1):
            metrics: list[dict[str, Any]] = []
            waiting: list[dict[str, jax.Array]] = []
            for batch in training_batches(examples, config.batch_size, seed, epoch, buckets):
                state, measured = step(state, base, batch, key)
                waiting.append(measured)
                progress.advance()
                # The metrics stay on the device for a while, so that no step waits for the one before it.
                if len(waiting) == every:
                    metrics += (found := _fetched(waiting, phase, epoch, len(metrics)))
                    waiting = []
                    if every < steps_per_epoch:
                        done = (epoch - 1) * steps_per_epoch + len(metrics)
                        note({"phase": phase, "step": done} | _averaged(found))
            metrics += _fetched(waiting, phase, epoch, len(metrics))
            record: Record = {"phase": phase, "epoch": epoch, "step": epoch * steps_per_epoch}
            record |= _averaged(metrics)
            measured_now = epoch % eval_every == 0 or epoch == config.epochs
            if measured_now:
                record |= evaluate(jlora.attach(base, state.adapters))
            record["seconds"] = round(time.perf_counter() - started, 3)
            note(record)
            progress.show(record)
            if measured_now:
                on_eval(record, state.adapters)
    return state.adapters, records


def _fetched(metrics: list[dict[str, jax.Array]], phase: str, epoch: int, before: int) -> list[dict[str, Any]]:
    """The metrics of some steps, of which ``before`` in their epoch were fetched already."""
    found = jax.device_get(metrics)
    if bad := [i for i, one in enumerate(found) if not np.isfinite(one["loss"])]:
        raise ConfigError(
            f"{phase}: the loss is {found[bad[0]]['loss']} in step {before + bad[0] + 1} of epoch {epoch}; the "
            "training diverged. Pass a smaller --learning-rate, more --fit.warmup or --fit.clip 1.0"
        )
    return found


def _averaged(metrics: list[dict[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0]}
