"""The training loop: steps, with records, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.config import ConfigError, FitConfig
from train.data.ragged import Examples
from train.job import Job
from train.loop.feed import Batches, Feed
from train.loop.run_files import RunFiles
from train.loop.state import Intervals, LoopState, PrimaryMetric
from train.loop.steps import InFlight, Steps
from train.loop.stop import Stop
from train.rundir.records import Record


@dataclass(frozen=True)
class Training:
    """One training phase of a job: the adapters, or a base from scratch.

    Attributes:
      job: the configuration with its data, network and task.
      phase: the name of the phase in the configuration, in records and on the progress bar.
      examples: to train on.
      start: the adapters to start from, a pure function of the base.
      evaluate: takes placed adapters and returns metrics for the record; may raise `train.loop.stop.Stopped`.
      metric: the metric among these that selects the best adapters.
      log: called with each record.
      ideal_seconds: the time of a step at the devices' peak, by the batch's shape; 0 if that is unknown.
    """

    job: Job
    phase: Literal["base", "fit"]
    examples: Examples
    start: Callable[[Any], dict[str, Any]]
    evaluate: Callable[[dict[str, Any]], dict[str, float]]
    metric: PrimaryMetric
    log: Callable[[Record], None]
    ideal_seconds: Callable[[tuple[int, ...]], float] = lambda _: 0.0

    @property
    def config(self) -> FitConfig:
        return getattr(self.job.config, self.phase)

    @property
    def rate_name(self) -> str:
        """The name of the peak learning rate in the configuration."""
        return "base" if self.phase == "base" else self.job.config.mode

    @property
    def intervals(self) -> Intervals:
        return self.job.intervals(self.config, self.examples)


class FitResult(NamedTuple):
    """The result of training.

    Attributes:
      adapters: the kept ones, the newest or the best, on their devices.
      state: the loop's state at the end.
      ended: why training ended, for a person.
      kept_step, kept_metric: of the kept adapters; the metric is None if it was not measured.
    """

    adapters: dict[str, Any]
    state: LoopState
    ended: str
    kept_step: int
    kept_metric: float | None


def fit(training: Training, base: Any, *, files: RunFiles | None = None, stop: Stop | None = None) -> FitResult:
    """Train adapters of a frozen base.

    Args:
      base: its parameters, on the devices of the job's layout.
      files: metrics and checkpoints, and where to resume; None for a training that is not saved.
      stop: checked after each step.

    Raises:
      ConfigError: if loss or gradient are not finite, with the step, its examples and the newest checkpoint.
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if ``stop`` was requested, after a checkpoint was saved.
    """
    return _Loop(training, base, files, stop).run()


class _Loop(Steps):
    """The training of one set of adapters."""

    state: LoopState

    def __init__(self, training: Training, base: Any, files: RunFiles | None, stop: Stop | None):
        super().__init__(training.job.layout, training.intervals, base, files, stop)
        self.t, self.files, self.phase = training, files, training.phase
        job, config = training.job, training.config
        tx = make_optimizer(config)
        schedule = make_schedule(config, getattr(job.config.learning_rate, training.rate_name), self.intervals.steps)
        self.train_state = self.layout.make_state(lambda base: init_state(tx, training.start(base)), base)
        self.key = random_key(job.config.seed, f"{training.phase} dropout")
        self.state = LoopState() if files is None else files.state
        if files is not None and self.state.step:
            self.train_state, self.key = files.resume(self.layout, self.train_state, self.key)
        step = make_step(
            job.network.forward,
            job.task,
            tx,
            schedule,
            smoothing=config.label_smoothing,
            accumulate=job.config.compute.accumulate,
            axis=self.layout.axis,
            freeze_a=config.optimizer == "lora-fa",
        )
        self.step = self.layout.compile_step(step, self.train_state)
        self.batches = Batches(
            training.examples, self.layout, config.batch_size, job.buckets, job.config.seed, training.ideal_seconds
        )
        self.feed = Feed(self.batches, on_host=self.layout.on_host)

    def is_over(self) -> bool:
        patience = self.t.config.patience
        return patience is not None and self.state.evals_since_best >= patience

    def result(self) -> FitResult:
        state, files = self.state, self.files
        ended = state.why_ended(self.intervals.steps, self.t.config.epochs, self.t.metric, self.t.phase)
        adapters, kept, metric = self.train_state.adapters, state.step, state.metric
        if files is not None:
            files.checkpoints.wait()
            if files.keep_best and state.best_step is not None:
                kept, metric = state.best_step, state.best_metric
            if kept != state.step:
                best, _ = files.checkpoints.restore(kept, self.layout, self.train_state, self.key)
                adapters = best.adapters
        return FitResult(adapters, state, ended, kept, metric)

    def take(self, done: InFlight, metrics: dict[str, np.ndarray], seconds: float, waited: float) -> None:
        """Records are logged as soon as their metrics arrive; `evaluate` logs those with its own metrics."""
        values = {name: value.item() for name, value in metrics.items()}
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
            raise ConfigError(self.diverged(done.step, values))
        for averages in (self.state.since_log, self.state.since_epoch):
            averages.add(values, done.counts, seconds if done.is_timed else None, waited)
        if not self.intervals.is_eval_due(done.step):
            self.log(done.step, {})

    def evaluate_if_due(self) -> bool:
        is_best = self.intervals.is_eval_due(self.state.step) and self.evaluate()
        return is_best and self.files is not None and self.files.keep_best

    def evaluate(self) -> bool:
        """Evaluate the adapters, log the metrics, and return whether these are the best so far."""
        self.collect(0)
        self.state.eval_pending = True
        with contextlib.nullcontext() if self.estimate.eval_seconds else self.compiling():
            metrics = self.t.evaluate(self.train_state.adapters)
        self.state.eval_pending = False
        self.estimate.eval_seconds, _ = self.lap()
        self.log(self.state.step, metrics)
        self.clock = time.perf_counter()
        return self.state.add_eval(self.t.metric, metrics[self.t.metric.name])

    def log(self, done: int, metrics: dict[str, float]) -> None:
        """Log the records due after a step. The last one includes the ``metrics`` of an evaluation."""
        left = self.estimate.left(done, self.intervals)
        for record in self.state.take_records(done, self.intervals, metrics):
            self.t.log({"phase": self.t.phase} | record)
            self.progress.show(record, [name for name in metrics if name in record], left)

    def diverged(self, step: int, metrics: Mapping[str, Any]) -> str:
        """The error for a step, counted from 1, whose metrics are not finite."""
        rows = self.batches.rows(step - 1)
        shown = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
        saved = [] if self.files is None else self.files.checkpoints.steps()
        good = f"; the newest checkpoint, of step {saved[-1]}, is from before" if saved else ""
        phase = self.t.phase
        return (
            f"{phase}: training diverged: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} in step "
            f"{step} (epoch {(step - 1) // self.intervals.epoch + 1}), on the training examples {shown}{good}. Pass a "
            f"smaller --learning-rate.{self.t.rate_name}, more --{phase}.warmup or --{phase}.clip 1.0, or remove the "
            "examples"
        )
