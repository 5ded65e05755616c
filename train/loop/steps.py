"""Steps in a row, dispatched ahead of the devices: when to collect their metrics, to save and to stop."""

from __future__ import annotations

import abc
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from train.compute.layouts import Layout
from train.compute.processes import first_decides
from train.config import SaveConfig
from train.loop.checkpoints import Checkpoints
from train.loop.feed import Feed
from train.loop.state import Intervals, StepCounts, TimeEstimate
from train.loop.stop import Stop, Stopped, on_ctrl_c
from train.report import console

AHEAD_SECONDS = 1.0
"""The work dispatched to the devices ahead of time, in seconds."""

UNSAVED_SECONDS = 30
"""The training that a Ctrl-C during compilation may lose, in seconds."""

START_OVER = "there is no checkpoint, and the same command starts over"


class State(Protocol):
    """What `Steps` reads and writes of the state in a checkpoint.

    Attributes:
      step: number of updates done.
      seconds: training time so far.
      eval_pending: whether an evaluation of this step is due and not done yet.
    """

    step: int
    seconds: float
    eval_pending: bool


class Files(Protocol):
    """What `Steps` uses of the files of a run; see `train.loop.run_files.RunFiles`."""

    checkpoints: Checkpoints
    command: str

    @property
    def saving(self) -> SaveConfig: ...

    def save(self, layout: Layout, train_state: Any, key: jax.Array) -> None: ...


class InFlight(NamedTuple):
    """A dispatched step, whose metrics may not be ready yet."""

    step: int
    metrics: Mapping[str, Any]
    counts: StepCounts
    is_timed: bool


class Steps(abc.ABC):
    """A training in this process: its state, one step, and the work due after a step.

    Attributes:
      phase: the name of the training, in messages and on the progress bar.
      state: the part of the checkpoint that is JSON.
      train_state, key: the other parts, on the devices.
      step: ``step(train_state, base, batch, key) -> (train_state, metrics)``, compiled.
      feed: the batches of the steps.
    """

    phase: str
    state: State
    train_state: Any
    key: jax.Array
    step: Callable[..., Any]
    feed: Feed
    progress: console.Progress

    def __init__(self, layout: Layout, intervals: Intervals, base: Any, files: Files | None, stop: Stop | None):
        self.layout, self.intervals, self.base, self.stop = layout, intervals, base, stop
        self._files = files
        self.compiled: set[tuple[Any, ...]] = set()
        self.in_flight: deque[InFlight] = deque()
        self.estimate = TimeEstimate()
        self.clock = self.saved_at = time.perf_counter()
        self.waited = 0.0  # for input, since the last lap

    @abc.abstractmethod
    def is_over(self) -> bool:
        """Whether training ends before its last step."""

    @abc.abstractmethod
    def take(self, done: InFlight, metrics: dict[str, np.ndarray], seconds: float, waited: float) -> None:
        """Add the metrics of a step, the next one in order, and log the records that are due."""

    @abc.abstractmethod
    def evaluate_if_due(self) -> bool:
        """Evaluate what is due after a step; return whether a checkpoint is due for it."""

    @abc.abstractmethod
    def result(self) -> Any:
        """The result, after the last step."""

    def run(self) -> Any:
        """Train to the end, and return the `result`.

        Raises:
          Stopped: if a stop is requested, after a checkpoint was saved.
        """
        self.saved_step = self.state.step
        with console.Progress(self.phase, self.intervals, self.state.step) as self.progress:
            try:
                # With files, Ctrl-C waits until a checkpoint is saved.
                with on_ctrl_c(f"{self.phase}: stopped; {START_OVER}" if self._files is None else None):
                    self._train()
                    return self.result()
            except Stopped as stopped:
                raise Stopped(self._save_and_stop(), stopped.code) from None
            finally:
                self.feed.close()

    def _train(self) -> None:
        if self.state.eval_pending:
            self._after_step()
        while self.state.step < self.intervals.steps and not self.is_over():
            self._advance()
            self._after_step()
            if self.stop is not None and self.stop.requested():
                raise Stopped(code=self.stop.code)
        self.save()

    # One step

    def _advance(self) -> None:
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
        self.in_flight.append(InFlight(self.state.step, metrics, one.counts, is_compiled))
        self.collect(self._ahead() if is_compiled else 0)
        self.progress.advance()

    def _ahead(self) -> int:
        """The maximum number of steps in flight: few enough that a stop need not wait long."""
        seconds = self.estimate.step_seconds
        return 1 if seconds is None else min(self.layout.ahead, max(1, int(AHEAD_SECONDS / max(seconds, 1e-6))))

    def collect(self, leave: int) -> None:
        """Wait for all steps in flight except the newest ``leave``, and `take` their metrics in order."""
        while len(self.in_flight) > leave or self.in_flight and self._is_done(self.in_flight[0]):
            done = self.in_flight.popleft()
            metrics = {name: np.asarray(value) for name, value in done.metrics.items()}
            seconds, waited = self.lap()
            if done.is_timed:
                self.estimate.add(seconds)
            self.take(done, metrics, seconds, waited)

    def _is_done(self, one: InFlight) -> bool:
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

    def _after_step(self) -> None:
        is_save_due = self.evaluate_if_due()
        if self._files is not None and (is_save_due or self._is_save_due(self._files)):
            self.save()
            self.clock = time.perf_counter()

    def _is_save_due(self, files: Files) -> bool:
        """By steps, or by the first process's clock, which several processes query together, but not at every step."""
        config = files.saving
        if config.every_steps is not None:
            return self.state.step % config.every_steps == 0
        if jax.process_count() > 1 and self.state.step % min(self.intervals.log, 50):
            return False
        due = time.perf_counter() - self.saved_at > 60 * config.every_minutes
        return first_decides(lambda: due)

    def save(self) -> None:
        """Save a checkpoint of this step, unless there is one."""
        if self._files is None or self.saved_step == self.state.step:
            return
        self.collect(0)
        self._files.save(self.layout, self.train_state, self.key)
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()

    # Stops

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """For a call that compiles a program. That may take minutes without a check for signals, so Ctrl-C ends the
        process at once, after saving what would be lost. Several processes stop together, after compilation."""
        if self._files is None or jax.process_count() > 1:
            yield
            return
        if time.perf_counter() - self.saved_at > UNSAVED_SECONDS:
            self.save()
            self._files.checkpoints.wait()
        then = f"{self._files.command} resumes from step {self.saved_step}" if self.saved_step else START_OVER
        with on_ctrl_c(f"{self.phase}: stopped during compilation, after step {self.state.step}; {then}"):
            yield

    def _save_and_stop(self) -> str:
        """Save a checkpoint, and return a message with the step to resume from."""
        done = f"{self.phase}: stopped after step {self.state.step} of {self.intervals.steps}"
        if self._files is None:
            return f"{done}; {START_OVER}"
        self.save()
        self._files.checkpoints.wait()
        return f"{done}; {self._files.command} resumes from there"
