"""The training loop: steps, with records, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.processes import first_decides
from train.compute.step import init_state, make_step
from train.config import ConfigError, FitConfig
from train.data.ragged import Examples
from train.job import Job
from train.loop.feed import Feed
from train.loop.run_files import RunFiles
from train.loop.state import Averages, Intervals, LoopState, PrimaryMetric, StepCounts, TimeEstimate
from train.loop.stop import Stop, Stopped, on_ctrl_c
from train.report import console
from train.rundir.records import Record

AHEAD_SECONDS = 1.0
"""The work dispatched to the devices ahead of time, in seconds."""

UNSAVED_SECONDS = 30
"""The training that a Ctrl-C during compilation may lose, in seconds."""

START_OVER = "there is no checkpoint, and the same command starts over"


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
    loop = _Loop(training, base, files, stop)
    with console.Progress(training.phase, loop.intervals, loop.state.step) as loop.progress:
        return loop.run()


class _InFlight(NamedTuple):
    """A dispatched step, whose metrics may not be ready yet."""

    step: int
    metrics: Mapping[str, Any]
    counts: StepCounts
    is_timed: bool


class _Loop:
    """A training in this process: its state, one step, and the work due after a step."""

    progress: console.Progress

    def __init__(self, training: Training, base: Any, files: RunFiles | None, stop: Stop | None):
        self.t, self.base, self.files, self.stop = training, base, files, stop
        job, config = training.job, training.config
        self.layout, self.intervals = job.layout, training.intervals
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
        self.feed = Feed(
            training.examples,
            self.layout,
            config.batch_size,
            job.buckets,
            job.config.seed,
            training.ideal_seconds,
        )
        self.compiled: set[tuple[int, ...]] = set()
        self.in_flight: deque[_InFlight] = deque()
        self.estimate = TimeEstimate()
        self.saved_step = self.state.step
        self.clock = self.saved_at = time.perf_counter()
        self.waited = 0.0  # for input, since the last lap

    def run(self) -> FitResult:
        """Train to the end, or until a stop is requested."""
        try:
            # With files, Ctrl-C waits until a checkpoint is saved.
            with on_ctrl_c(f"{self.t.phase}: stopped; {START_OVER}" if self.files is None else None):
                self.train()
                return self.result()
        except Stopped as stopped:
            raise Stopped(self.save_and_stop(), stopped.code) from None
        finally:
            self.feed.close()

    def train(self) -> None:
        if self.state.eval_pending:
            self.after_step()
        while self.state.step < self.intervals.steps and not self.is_out_of_patience():
            self.advance()
            self.after_step()
            if self.stop is not None and self.stop.requested():
                raise Stopped(code=self.stop.code)
        self.save()

    def is_out_of_patience(self) -> bool:
        patience = self.t.config.patience
        return patience is not None and self.state.evals_since_best >= patience

    def result(self) -> FitResult:
        state, files = self.state, self.files
        epochs = self.t.config.epochs
        ended = "the only epoch is done" if epochs == 1 else f"all {epochs} epochs are done"
        if state.step < self.intervals.steps:
            ended = (
                f"{state.evals_since_best} evaluations in a row had no better {self.t.metric.name} "
                f"({self.t.phase}.patience)"
            )
        adapters, kept, metric = self.train_state.adapters, state.step, state.metric
        if files is not None:
            files.checkpoints.wait()
            if files.keep_best and state.best_step is not None:
                kept, metric = state.best_step, state.best_metric
            if kept != state.step:
                best, _ = files.checkpoints.restore(kept, self.layout, self.train_state, self.key)
                adapters = best.adapters
        return FitResult(adapters, state, ended, kept, metric)

    # One step

    def advance(self) -> None:
        """Dispatch one step. Its metrics stay on the devices for now, so the host need not wait for them."""
        asked = time.perf_counter()
        one = self.feed.input(self.state.step, self.intervals.steps)
        self.waited += time.perf_counter() - asked
        is_compiled = one.shape in self.compiled
        if not is_compiled:  # keeps compilation out of the timing: no step is in flight during it
            self.collect(0)
        with contextlib.nullcontext() if is_compiled else self.compiling():
            self.train_state, metrics = self.step(self.train_state, self.base, one.batch, self.key)
        self.compiled.add(one.shape)
        self.state.step += 1
        self.in_flight.append(_InFlight(self.state.step, metrics, one.counts, is_compiled))
        self.collect(self.ahead() if is_compiled else 0)
        self.progress.advance()

    def ahead(self) -> int:
        """The maximum number of steps in flight: few enough that a stop need not wait long."""
        seconds = self.estimate.step_seconds
        return 1 if seconds is None else min(self.layout.ahead, max(1, int(AHEAD_SECONDS / max(seconds, 1e-6))))

    def collect(self, leave: int) -> None:
        """Wait for all steps in flight except the newest ``leave``, and collect their metrics in order.

        Records are logged as soon as their metrics arrive; `evaluate` logs those with its own metrics.
        """
        while len(self.in_flight) > leave or self.in_flight and self.is_done(self.in_flight[0]):
            done = self.in_flight.popleft()
            metrics = {name: np.asarray(value).item() for name, value in done.metrics.items()}
            if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
                raise ConfigError(self.diverged(done.step, metrics))
            seconds, waited = self.lap()
            if done.is_timed:
                self.estimate.add(seconds)
            for averages in (self.state.since_log, self.state.since_epoch):
                averages.add(metrics, done.counts, seconds if done.is_timed else None, waited)
            if not self.intervals.is_eval_due(done.step):
                self.log(done.step, {})

    def is_done(self, one: _InFlight) -> bool:
        """Whether a step's metrics can be had without waiting. Several processes collect them at the same steps."""
        return jax.process_count() == 1 and all(value.is_ready() for value in one.metrics.values())

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, counted as training time; and those of them that were spent waiting for input."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        waited, self.waited = min(self.waited, seconds), 0.0
        self.state.seconds += seconds
        return seconds, waited

    # What is due after a step

    def after_step(self) -> None:
        is_best = self.intervals.is_eval_due(self.state.step) and self.evaluate()
        if self.files is not None and (is_best and self.files.keep_best or self.is_save_due(self.files)):
            self.save()
            self.clock = time.perf_counter()

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
        state, records = self.state, list[Record]()
        is_end = self.intervals.is_epoch_end(done)
        if self.intervals.is_log_due(done):
            records.append({"step": done} | state.since_log.compute() | ({} if is_end else metrics))
            state.since_log = Averages()
        if is_end:
            epoch = {"epoch": done // self.intervals.epoch, "step": done}
            records.append(epoch | state.since_epoch.compute() | metrics | {"seconds": round(state.seconds, 3)})
            state.since_epoch = Averages()
        left = self.estimate.left(done, self.intervals)
        for record in records:
            self.t.log({"phase": self.t.phase} | record)
            self.progress.show(record, [name for name in metrics if name in record], left)

    def is_save_due(self, files: RunFiles) -> bool:
        """By steps, or by the first process's clock, which several processes query together, but not at every step."""
        config = files.config.save
        if config.every_steps is not None:
            return self.state.step % config.every_steps == 0
        if jax.process_count() > 1 and self.state.step % min(self.intervals.log, 50):
            return False
        due = time.perf_counter() - self.saved_at > 60 * config.every_minutes
        return first_decides(lambda: due)

    def save(self) -> None:
        """Save a checkpoint of this step, unless there is one."""
        if self.files is None or self.saved_step == self.state.step:
            return
        self.collect(0)
        self.files.save(self.layout, self.train_state, self.key)
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()

    # Stops

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """For a call that compiles a program. That may take minutes without a check for signals, so Ctrl-C ends the
        process at once, after saving what would be lost. Several processes stop together, after compilation."""
        if self.files is None or jax.process_count() > 1:
            yield
            return
        if time.perf_counter() - self.saved_at > UNSAVED_SECONDS:
            self.save()
            self.files.checkpoints.wait()
        then = f"{self.files.command} resumes from step {self.saved_step}" if self.saved_step else START_OVER
        with on_ctrl_c(f"{self.t.phase}: stopped during compilation, after step {self.state.step}; {then}"):
            yield

    def save_and_stop(self) -> str:
        """Save a checkpoint, and return a message with the step to resume from."""
        done = f"{self.t.phase}: stopped after step {self.state.step} of {self.intervals.steps}"
        if self.files is None:
            return f"{done}; {START_OVER}"
        self.save()
        self.files.checkpoints.wait()
        return f"{done}; {self.files.command} resumes from there"

    def diverged(self, step: int, metrics: Mapping[str, Any]) -> str:
        """The error for a step, counted from 1, whose metrics are not finite."""
        rows = self.feed.rows(step - 1)
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
