"""The loop's bookkeeping: intervals, averages over steps, the time left, the state in a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DEFAULT_LOGS = 50
"""The minimum number of metric records of a training, by default."""


class PrimaryMetric(NamedTuple):
    """The metric that selects the best adapters.

    Attributes:
      name: in the records, such as ``validation_accuracy``.
      higher_is_better: whether larger values are better.
    """

    name: str
    higher_is_better: bool

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats the best so far; anything beats None and NaN."""
        return best is None or math.isnan(best) or (value > best if self.higher_is_better else value < best)


@dataclass(frozen=True)
class Intervals:
    """The steps after which something is due.

    Attributes:
      epoch: steps per epoch.
      steps: steps of the whole training.
      log: steps between records of metrics.
      eval: steps between evaluations.
    """

    epoch: int
    steps: int
    log: int
    eval: int

    @staticmethod
    def of(
        epochs: int, steps_per_epoch: int, *, log_every: int | None, eval_every: int, eval_every_steps: int | None
    ) -> Intervals:
        """The intervals of a training of ``epochs``; ``eval_every`` is in epochs, the other two in steps."""
        steps = epochs * steps_per_epoch
        log = log_every or max(1, steps // DEFAULT_LOGS)
        return Intervals(steps_per_epoch, steps, log, eval_every_steps or eval_every * steps_per_epoch)

    def is_epoch_end(self, done: int) -> bool:
        return done % self.epoch == 0

    def is_eval_due(self, done: int) -> bool:
        return done % self.eval == 0 or done == self.steps

    def is_log_due(self, done: int) -> bool:
        """Records within epochs, except those that would only repeat the epochs' own."""
        inside = self.is_eval_due(done) and not self.is_epoch_end(done)
        return inside or self.log != self.epoch and done % self.log == 0

    def evals_after(self, done: int) -> int:
        """The number of evaluations left after ``done`` steps."""
        last = done < self.steps and self.steps % self.eval != 0
        return self.steps // self.eval - done // self.eval + last


class StepCounts(NamedTuple):
    """The size of one step's computation.

    Attributes:
      examples, tokens: in its batch, without padding; 0 tokens without texts.
      ideal_seconds: its time at the devices' peak; 0 if unknown.
      padded_tokens: tokens with the padding.
      loss_tokens: tokens that carry loss; 0 without a loss mask.
    """

    examples: int
    tokens: int
    ideal_seconds: float
    padded_tokens: int = 0
    loss_tokens: int = 0


@dataclass
class Averages:
    """Averages over steps: metrics over all of them, speed over the timed ones.

    Attributes:
      steps: number of steps.
      sums: of each metric.
      learning_rate: the newest step's; None before the first one.
      tokens, padded_tokens, loss_tokens: in all steps, see `StepCounts`.
      timed_steps, timed_examples, timed_tokens, timed_loss_tokens: in the timed steps, those without compilation.
      seconds, ideal_seconds: the time of the timed steps, actual and at the devices' peak.
      input_seconds: the part of the actual time in which the host waited for a batch.
    """

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    tokens: int = 0
    padded_tokens: int = 0
    timed_steps: int = 0
    timed_examples: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    ideal_seconds: float = 0.0
    loss_tokens: int = 0
    timed_loss_tokens: int = 0
    input_seconds: float = 0.0

    def add(
        self, metrics: Mapping[str, Any], counts: StepCounts, seconds: float | None = None, waited: float = 0.0
    ) -> None:
        """Add a step; ``seconds`` is None if not timed, and ``waited`` the part of them spent waiting for its batch."""
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.learning_rate = metrics.get("learning_rate", self.learning_rate)
        self.tokens += counts.tokens
        self.padded_tokens += counts.padded_tokens
        self.loss_tokens += counts.loss_tokens
        if seconds is not None:
            self.timed_steps += 1
            self.timed_examples += counts.examples
            self.timed_tokens += counts.tokens
            self.timed_loss_tokens += counts.loss_tokens
            self.seconds += seconds
            self.input_seconds += waited
            self.ideal_seconds += counts.ideal_seconds

    def compute(self) -> dict[str, float]:
        """The metrics' means, the newest learning rate, the tokens, and the speed.

        ``tokens`` and ``loss_tokens`` are numbers without padding, ``padding`` is its share of the computed tokens, and
        ``input`` the share of the time in which the host waited for a batch.
        """
        found = {name: total / self.steps for name, total in self.sums.items()}
        if self.learning_rate is not None:
            found["learning_rate"] = self.learning_rate
        if self.tokens:
            found["tokens"] = self.tokens
        if self.loss_tokens:
            found["loss_tokens"] = self.loss_tokens
        if self.padded_tokens:
            found["padding"] = 1 - self.tokens / self.padded_tokens
        if self.timed_steps and self.seconds > 0:
            found["step_seconds"] = self.seconds / self.timed_steps
            found["examples_per_second"] = self.timed_examples / self.seconds
            if self.timed_tokens:
                found["tokens_per_second"] = self.timed_tokens / self.seconds
            if self.timed_loss_tokens:
                found["loss_tokens_per_second"] = self.timed_loss_tokens / self.seconds
            found["input"] = self.input_seconds / self.seconds
            if self.ideal_seconds:
                found["mfu"] = self.ideal_seconds / self.seconds
        return found


@dataclass
class TimeEstimate:
    """Estimates the time left, from this process's timings.

    Attributes:
      seconds, steps: of all timed steps, and their number.
      eval_seconds: of the newest evaluation; 0 before the first one, which compiles.
    """

    seconds: float = 0.0
    steps: int = 0
    eval_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Add a timed step."""
        self.seconds += seconds
        self.steps += 1

    @property
    def step_seconds(self) -> float | None:
        """The mean time of a step; None before the first timing."""
        return self.seconds / self.steps if self.steps else None

    def left(self, done: int, intervals: Intervals) -> float | None:
        """Seconds of the steps and evaluations after step ``done``; None before the first timing."""
        if self.step_seconds is None:
            return None
        return self.step_seconds * (intervals.steps - done) + self.eval_seconds * intervals.evals_after(done)


@dataclass
class LoopState:
    """The loop's part of a checkpoint: JSON, the same on any number of devices and processes.

    The order of the data, dropout and the learning rate are functions of the step and need no state.

    Attributes:
      step: number of updates done.
      seconds: training time so far.
      since_log, since_epoch: averages since the last record, and since the epoch began.
      metric: the newest value of the primary metric; None before the first evaluation.
      best_metric, best_step: its best value, and the step of that evaluation.
      evals_since_best: evaluations after that one.
      eval_pending: whether this step's evaluation is due and not done yet.
      metrics_bytes, metrics_digest: size and SHA-256 of metrics.jsonl.
      planned_epochs: the planned numbers of epochs and their first steps, as ``[step, epochs]``; see
        `train.loop.extend`.
    """

    step: int = 0
    seconds: float = 0.0
    since_log: Averages = field(default_factory=Averages)
    since_epoch: Averages = field(default_factory=Averages)
    metric: float | None = None
    best_metric: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    eval_pending: bool = False
    metrics_bytes: int = 0
    metrics_digest: str = ""
    planned_epochs: list[list[int]] = field(default_factory=list)

    def add_eval(self, metric: PrimaryMetric, value: float) -> bool:
        """Add an evaluation, and return whether it is the best so far."""
        is_best = metric.is_better(value, self.best_metric)
        self.metric = value
        if is_best:
            self.best_metric, self.best_step, self.evals_since_best = value, self.step, 0
        else:
            self.evals_since_best += 1
        return is_best

    def take_records(self, done: int, intervals: Intervals, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
        """The records due after step ``done``, and new averages; the last record includes the ``metrics`` of an
        evaluation."""
        records, is_end = list[dict[str, Any]](), intervals.is_epoch_end(done)
        if intervals.is_log_due(done):
            records.append({"step": done} | self.since_log.compute() | ({} if is_end else dict(metrics)))
            self.since_log = Averages()
        if is_end:
            epoch = {"epoch": done // intervals.epoch, "step": done}
            records.append(epoch | self.since_epoch.compute() | dict(metrics) | {"seconds": round(self.seconds, 3)})
            self.since_epoch = Averages()
        return records

    def why_ended(self, steps: int, epochs: int, metric: PrimaryMetric, phase: str) -> str:
        """Why a training of ``steps`` ended, for a person: it is done, or out of patience."""
        if self.step < steps:
            return f"{self.evals_since_best} evaluations in a row had no better {metric.name} ({phase}.patience)"
        return "the only epoch is done" if epochs == 1 else f"all {epochs} epochs are done"

    def to_json(self) -> dict[str, Any]:
        """The state as JSON; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LoopState:
        """The state from `to_json`.

        Raises:
          KeyError, TypeError: for anything else.
        """
        averages = {name: Averages(**value[name]) for name in ("since_log", "since_epoch")}
        return LoopState(**{**value, **averages})
