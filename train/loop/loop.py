"""A training: steps, with records, measurements and checkpoints on the way."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from train.compute.keys import random_key
from train.compute.layouts import Layout
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.processes import first_decides
from train.compute.step import TrainState, init_state, make_step
from train.config import ConfigError, FitConfig, SaveConfig
from train.data.batches import Examples, batch_of, bucket_of, lengths, size, training_rows
from train.loop.checkpoints import Checkpoints
from train.loop.progress import Forecast, Intervals, Position, StepCounts, Window
from train.loop.stop import Stop, Stopped, at_once
from train.networks.network import Forward
from train.report import console
from train.rundir.records import Record
from train.tasks.base import Task

AHEAD_SECONDS = 1.0
"""How long the devices may have to do without the host."""

UNSAVED_SECONDS = 30
"""How much training may be lost to a Ctrl-C while something is compiled."""

ANEW = "there is no checkpoint, and the same command begins anew"


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and who is told.

    Attributes:
      phase: its name, in records and on the progress bar.
      forward, task: the network and what it learns.
      examples: that it learns from.
      config: how.
      learning_rate: the peak.
      rate_flag: the flag that sets it, for a message.
      seed: of the order of the examples and of dropout.
      intervals: when something is due.
      buckets: the lengths to which batches are padded.
      accumulate: parts of a batch that are computed one after the other.
      evaluate: takes adapters at their places and returns figures for the record; may raise `train.loop.stop.Stopped`.
      figure: the one of these by which adapters are the best ones, and its sign: 1 if more is better, else -1.
      log: called with each record as soon as there is one.
      ideal_seconds: of a step on a batch of so many rows of this length, at the devices' peak; 0 if that is not known.
    """

    phase: str
    forward: Forward
    task: Task
    examples: Examples
    config: FitConfig
    learning_rate: float
    rate_flag: str
    seed: int
    intervals: Intervals
    evaluate: Callable[[dict[str, Any]], dict[str, float]]
    figure: tuple[str, int]
    log: Callable[[Record], None]
    buckets: Sequence[int] = ()
    accumulate: int = 1
    ideal_seconds: Callable[[tuple[int, ...]], float] = lambda _: 0.0


@dataclass(frozen=True)
class Checkpointing:
    """Where a training is kept, and when.

    Attributes:
      checkpoints: where.
      config: when.
      position: where it goes on; at the start for a new one.
      identity: the run's configuration as JSON, kept with each checkpoint.
      begin: called when the position is restored: what was kept of later steps is given up.
      sync: puts the records on disk, and returns their size and digest.
      keep_best: whether the best adapters are wanted in the end.
      again: the command that goes on, for a message.
    """

    checkpoints: Checkpoints
    config: SaveConfig
    position: Position
    identity: Mapping[str, Any]
    begin: Callable[[], None]
    sync: Callable[[], tuple[int, str]]
    keep_best: bool
    again: str


class Fitted(NamedTuple):
    """What a training comes to.

    Attributes:
      adapters: that are kept, at their places: the newest or the best ones.
      position: where it ended.
      ended: why, for a person.
      kept_step: of which step the adapters are.
      figure, best: measured of them, and the best one of all; None where nothing was.
    """

    adapters: dict[str, Any]
    position: Position
    ended: str
    kept_step: int
    figure: float | None
    best: float | None


def fit(
    training: Training,
    layout: Layout,
    base: Any,
    start: Callable[[Any], dict[str, Any]],
    *,
    saving: Checkpointing | None = None,
    stop: Stop | None = None,
) -> Fitted:
    """Train adapters; ``base`` stays as it is.

    Args:
      base: at its place in ``layout``.
      start: the adapters to start from, a pure function of the base.
      saving: how it is kept; None for a training that is not.
      stop: asked after each step.

    Raises:
      ConfigError: if the loss is not finite, naming the step, its examples and the newest checkpoint.
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if it was asked to stop, and did.
    """
    loop = _Loop(training, layout, base, start, saving, stop)
    with console.Progress(training.phase, training.intervals, loop.position.step) as loop.progress:
        return loop.run()


class _Loop:
    """The state of a training in this process."""

    progress: console.Progress

    def __init__(
        self,
        training: Training,
        layout: Layout,
        base: Any,
        start: Callable[[Any], dict[str, Any]],
        saving: Checkpointing | None,
        stop: Stop | None,
    ):
        self.t, self.layout, self.base, self.saving, self.stop = training, layout, base, saving, stop
        config, intervals = training.config, training.intervals
        tx, schedule = make_optimizer(config), make_schedule(config, training.learning_rate, intervals.steps)
        self.key = random_key(training.seed, f"{training.phase} dropout")
        self.state: TrainState = layout.make_state(lambda base: init_state(tx, start(base)), base)
        self.position = Position() if saving is None else saving.position
        if saving is not None and self.position.step:
            self.state, self.key = saving.checkpoints.restore(self.position.step, layout, self.state, self.key)
        if saving is not None:
            saving.begin()
        self.saved_step = self.position.step
        step = make_step(
            training.forward,
            training.task,
            tx,
            schedule,
            smoothing=config.label_smoothing,
            accumulate=training.accumulate,
            axis=layout.axis,
        )
        self.step = layout.compile_step(step, self.state)
        self.lengths = lengths(training.examples)
        self.seen: set[tuple[int, ...]] = set()
        self.waiting: deque[tuple[int, Any, StepCounts, bool]] = deque()
        self.forecast = Forecast()
        self.clock = self.saved_at = time.perf_counter()

    def run(self) -> Fitted:
        try:
            # Ctrl-C waits for what can be saved.
            with at_once(self.abandoned() if self.saving is None else None):
                return self.train()
        except Stopped as stopped:
            raise Stopped(self.stopped(), stopped.code) from None

    def train(self) -> Fitted:
        position, intervals = self.position, self.t.intervals
        if position.unmeasured:
            self.look()
        while position.step < intervals.steps and not self.is_exhausted():
            self.advance()
            self.look()
            if self.stop is not None and self.stop.asked():
                raise self.stop.stopped()
        self.save()
        adapters, kept, figure = self.state.adapters, position.step, position.figure
        if self.saving is not None:
            self.saving.checkpoints.wait()
            if self.saving.keep_best and position.best_step is not None:
                kept, figure = position.best_step, position.best
            if kept != position.step:
                best, _ = self.saving.checkpoints.restore(kept, self.layout, self.state, self.key)
                adapters = best.adapters
        figure, best = (None if one is None else self.t.figure[1] * one for one in (figure, position.best))
        return Fitted(adapters, position, self.ended(), kept, figure, best)

    def ended(self) -> str:
        """Why the training is at its end."""
        t, position = self.t, self.position
        if position.step < t.intervals.steps:
            return f"{position.stale} measurements in a row had no better {t.figure[0]} ({t.phase}.patience)"
        return f"all {t.config.epochs} epochs are done"

    def is_exhausted(self) -> bool:
        """Whether the figures have not become better for long."""
        patience = self.t.config.patience
        return patience is not None and self.position.stale >= patience

    def advance(self) -> None:
        """One step. Its metrics stay on the devices for a while, so that it need not wait for the one before."""
        t, done = self.t, self.position.step
        rows = self.rows(done)
        bucket = bucket_of(t.examples, rows, t.buckets)
        batch = self.layout.place_batch(lambda part: batch_of(t.examples, rows[part], bucket), len(rows))
        shape = (len(rows), *bucket)
        tokens, places = (0, 0) if self.lengths is None else (int(self.lengths[rows].sum()), math.prod(shape))
        counts, timed = StepCounts(len(rows), tokens, t.ideal_seconds(shape), places), shape in self.seen
        if not timed:  # It will be compiled, and that is no part of the steps' time: the steps around it wait for it.
            self.fetch(0)
        with contextlib.nullcontext() if timed else self.compiling():
            self.state, metrics = self.step(self.state, self.base, batch, self.key)
        self.seen.add(shape)
        self.waiting.append((done + 1, metrics, counts, timed))
        self.position.step = done + 1
        self.fetch(self.ahead() if timed else 0)
        self.progress.advance()

    def ahead(self) -> int:
        """How many steps may be under way: so few that whoever asks to stop need not wait long for them."""
        seconds = self.forecast.step_seconds
        return 1 if seconds is None else min(self.layout.ahead, max(1, int(AHEAD_SECONDS / max(seconds, 1e-6))))

    def rows(self, step: int) -> np.ndarray:
        """The numbers of the examples that a step, counted from 0, learns from."""
        return training_rows(size(self.t.examples), self.t.config.batch_size, self.t.seed, step)

    def fetch(self, leave: int) -> None:
        """Take the metrics of all steps but the newest ``leave``, in order, and wait for these steps.

        What is due after a step is told as soon as its metrics are here; where figures belong to it, by `look`.
        """
        position = self.position
        while len(self.waiting) > leave:
            done, metrics, counts, timed = self.waiting.popleft()
            found = {name: np.asarray(value).item() for name, value in metrics.items()}
            if not all(math.isfinite(found[name]) for name in ("loss", "grad_norm")):
                raise ConfigError(self.diverged(done, found))
            now = time.perf_counter()
            for window in (position.line, position.epoch):
                window.add(found, counts)
                if timed:
                    window.add_time(now - self.clock, counts)
            if timed:
                self.forecast.add(now - self.clock)
            position.seconds += now - self.clock
            self.clock = now
            if not self.t.intervals.is_eval_due(done):
                self.tell(done, {})

    def look(self) -> None:
        """What is due after a step: a measurement, a checkpoint."""
        t, position, is_best = self.t, self.position, False
        if t.intervals.is_eval_due(position.step):
            self.fetch(0)
            position.unmeasured = True
            with contextlib.nullcontext() if self.forecast.measuring else self.compiling():
                figures = t.evaluate(self.state.adapters)
            position.unmeasured = False
            self.forecast.measuring = time.perf_counter() - self.clock
            position.seconds += self.forecast.measuring
            self.tell(position.step, figures)
            is_best = position.measured(t.figure[1] * figures[t.figure[0]])
            self.clock = time.perf_counter()
        if self.saving is not None and (is_best and self.saving.keep_best or self.is_save_due()):
            self.save()
            self.clock = time.perf_counter()

    def tell(self, done: int, figures: dict[str, float]) -> None:
        """The records that are due after a step, of which the last one has the figures."""
        intervals, position = self.t.intervals, self.position
        told: list[Record] = []
        is_end = intervals.is_epoch_end(done)
        if intervals.is_line_due(done):
            told.append({"step": done} | position.line.averages() | ({} if is_end else figures))
            position.line = Window()
        if is_end:
            seconds = {"seconds": round(position.seconds, 3)}
            told.append(
                {"epoch": done // intervals.epoch, "step": done} | position.epoch.averages() | figures | seconds
            )
            position.epoch = Window()
        left = self.forecast.left(done, intervals)
        for record in told:
            self.t.log({"phase": self.t.phase} | record)
            self.progress.show(record, [name for name in figures if name in record], left)

    def is_save_due(self) -> bool:
        """By steps, or by the first process's clock, at which several processes look together, and not at each step."""
        assert self.saving is not None
        config = self.saving.config
        if config.every_steps is not None:
            return self.position.step % config.every_steps == 0
        if jax.process_count() > 1 and self.position.step % min(self.t.intervals.line, 50):
            return False
        due = time.perf_counter() - self.saved_at > 60 * config.every_minutes
        return first_decides(lambda: "yes" if due else "no") == "yes"

    def save(self) -> None:
        """A checkpoint of where the training is, unless there is one."""
        if self.saving is None or self.saved_step == self.position.step:
            return
        self.fetch(0)
        self.position.metrics_bytes, self.position.metrics_digest = self.saving.sync()
        self.saving.checkpoints.save(self.layout, self.state, self.position, self.key, self.saving.identity)
        self.saved_step, self.saved_at = self.position.step, time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Where a program is compiled, which may take minutes and cannot be left: Ctrl-C ends the process there, at the
        cost of few steps. Several processes go on to where all of them stop."""
        if self.saving is None or jax.process_count() > 1:
            yield
            return
        if time.perf_counter() - self.saved_at > UNSAVED_SECONDS:
            self.save()
            self.saving.checkpoints.wait()
        with at_once(self.abandoned()):
            yield

    def abandoned(self) -> str:
        """What is told of a training that is ended at once."""
        if self.saving is None:
            return f"{self.t.phase}: stopped, as asked; {ANEW}"
        goes = f"{self.saving.again} goes on from step {self.saved_step}" if self.saved_step else ANEW
        return f"{self.t.phase}: stopped while it compiled, after step {self.position.step}, as asked; {goes}"

    def stopped(self) -> str:
        """Save, and say from where the training will go on."""
        done = f"{self.t.phase}: stopped after step {self.position.step} of {self.t.intervals.steps}, as asked"
        if self.saving is None:
            return f"{done}; {ANEW}"
        self.save()
        self.saving.checkpoints.wait()
        return f"{done}; {self.saving.again} goes on from there"

    def diverged(self, done: int, metrics: Mapping[str, Any]) -> str:
        """What went wrong in the step that was the ``done``-th."""
        rows = self.rows(done - 1)
        shown = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
        saved = [] if self.saving is None else self.saving.checkpoints.steps()
        good = f"; the newest checkpoint, of step {saved[-1]}, is from before" if saved else ""
        return (
            f"{self.t.phase}: the loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']} in step "
            f"{done} (epoch {(done - 1) // self.t.intervals.epoch + 1}), of the training examples {shown}{good}. The "
            f"training diverged: pass a smaller {self.t.rate_flag}, more --{self.t.phase}.warmup or "
            f"--{self.t.phase}.clip 1.0, or take the examples out"
        )
