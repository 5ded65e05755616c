"""How far a training is: the intervals that its configuration sets, and the position that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LINES = 50
"""How often a training tells its loss, at least."""


@dataclass(frozen=True)
class Intervals:
    """When something is due, by the number of steps done so far.

    Attributes:
      epoch: steps of an epoch.
      steps: of the whole training.
      line: steps between two lines of metrics.
      eval: steps between two measurements.
    """

    epoch: int
    steps: int
    line: int
    eval: int

    @staticmethod
    def of(
        epochs: int, steps_per_epoch: int, *, log_every: int | None, eval_every: int, eval_every_steps: int | None
    ) -> Intervals:
        """The pace of so many epochs."""
        steps = epochs * steps_per_epoch
        line = log_every or max(1, steps // LINES)
        return Intervals(steps_per_epoch, steps, line, eval_every_steps or eval_every * steps_per_epoch)

    def is_epoch_end(self, done: int) -> bool:
        return done % self.epoch == 0

    def is_eval_due(self, done: int) -> bool:
        return done % self.eval == 0 or done == self.steps

    def is_line_due(self, done: int) -> bool:
        """Lines stand beside the epochs' records, and are left out where they would be the same."""
        inside = self.is_eval_due(done) and not self.is_epoch_end(done)
        return inside or self.line != self.epoch and done % self.line == 0

    def evals_after(self, done: int) -> int:
        """How many measurements are due after so many steps."""
        last = done < self.steps and self.steps % self.eval != 0
        return self.steps // self.eval - done // self.eval + last


class StepCounts(NamedTuple):
    """What a step works through; see `Window`."""

    examples: int
    tokens: int
    ideal_seconds: float
    places: int = 0


@dataclass
class Window:
    """Sums over the steps since it was opened.

    Attributes:
      steps: how many.
      sums: of each metric.
      learning_rate: of the newest step, or None before there is one.
      real, places: tokens, and tokens with the padding among them, of all steps; 0 where there are none.
      seconds, timed: how long steps took, and how many of them were timed: those that compiled nothing.
      examples, tokens: in the timed steps.
      ideal_seconds: that the timed steps would take at the devices' peak; 0 where that is not known.
    """

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    timed: int = 0
    examples: int = 0
    tokens: int = 0
    ideal_seconds: float = 0.0
    learning_rate: float | None = None
    real: int = 0
    places: int = 0

    def add(self, metrics: Mapping[str, Any], counts: StepCounts | None = None) -> None:
        """Count a step with these metrics."""
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.learning_rate = metrics.get("learning_rate", self.learning_rate)
        if counts is not None:
            self.real += counts.tokens
            self.places += counts.places

    def add_time(self, seconds: float, counts: StepCounts) -> None:
        """Count the time of a step."""
        self.seconds += seconds
        self.timed += 1
        self.examples += counts.examples
        self.tokens += counts.tokens
        self.ideal_seconds += counts.ideal_seconds

    def averages(self) -> dict[str, float]:
        """The metrics' means, the newest learning rate, the share of padding, and the speed of the timed steps."""
        found = {name: total / self.steps for name, total in self.sums.items()}
        if self.learning_rate is not None:
            found["learning_rate"] = self.learning_rate
        if self.places:
            found["padding"] = 1 - self.real / self.places
        if self.timed and self.seconds > 0:
            found["step_seconds"] = self.seconds / self.timed
            found["examples_per_second"] = self.examples / self.seconds
            if self.tokens:
                found["tokens_per_second"] = self.tokens / self.seconds
            if self.ideal_seconds:
                found["mfu"] = self.ideal_seconds / self.seconds
        return found


@dataclass
class Forecast:
    """How long the rest of a training will take, by what was timed in this process.

    Attributes:
      seconds, steps: that steps took, and how many; those that compiled are left out.
      measuring: seconds of the newest measurement; the first one compiles.
    """

    seconds: float = 0.0
    steps: int = 0
    measuring: float = 0.0

    def add(self, seconds: float) -> None:
        """Count the time of a step."""
        self.seconds += seconds
        self.steps += 1

    @property
    def step_seconds(self) -> float | None:
        """Of a step; None before one was timed."""
        return self.seconds / self.steps if self.steps else None

    def left(self, done: int, intervals: Intervals) -> float | None:
        """Seconds after so many steps until the last one is done and measured; None before a step was timed."""
        if self.step_seconds is None:
            return None
        return self.step_seconds * (intervals.steps - done) + self.measuring * intervals.evals_after(done)


@dataclass
class Position:
    """Where a training is, for any number of devices and processes; JSON in a checkpoint.

    The order of the data, dropout and the learning rate are functions of the step.

    Attributes:
      step: updates done.
      seconds: that the training took so far.
      line, epoch: since the last line of metrics, and since the epoch began.
      figure: the newest measured figure, larger is better; None before the first measurement.
      best, best_step: the best one, and where.
      stale: measurements since then.
      metrics_bytes, metrics_digest: the size of metrics.jsonl, and the SHA-256 of what it held.
      unmeasured: whether this step's measurement was due and is not done.
      planned: how many epochs were planned from which step on, as ``[step, epochs]``, see `train.loop.extend`.
    """

    step: int = 0
    seconds: float = 0.0
    line: Window = field(default_factory=Window)
    epoch: Window = field(default_factory=Window)
    figure: float | None = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    metrics_bytes: int = 0
    metrics_digest: str = ""
    unmeasured: bool = False
    planned: list[list[int]] = field(default_factory=list)

    def measured(self, figure: float) -> bool:
        """Take note of a measurement, and say whether it is the best one."""
        better = self.best is None or figure > self.best or math.isnan(self.best)
        self.figure = figure
        if better:
            self.best, self.best_step, self.stale = figure, self.step, 0
        else:
            self.stale += 1
        return better

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Position:
        """The position that `to_json` wrote.

        Raises:
          KeyError, TypeError: if it is none.
        """
        windows = {name: Window(**value[name]) for name in ("line", "epoch")}
        return Position(**{**value, **windows})
