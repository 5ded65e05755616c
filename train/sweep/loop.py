"""The training of a round: one step for all members, a record and an evaluation for each, and members that leave it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.compute.keys import random_key
from train.data.batches import Batch
from train.job import Job
from train.loop.feed import Feed
from train.loop.loop import FitResult
from train.loop.steps import InFlight, Steps
from train.loop.stop import Stop
from train.rundir.records import Record
from train.sweep.files import RoundFiles
from train.sweep.halving import left_behind, rungs
from train.sweep.program import Program
from train.sweep.stacked import Stacking, rates_of
from train.sweep.state import MemberState, RoundState

DIVERGED = "diverged"


@dataclass(frozen=True)
class Round:
    """What a round trains.

    Attributes:
      names, jobs: of the members, those with the same data and seed next to each other.
      base: parameters on their devices.
      new: see `train.sweep.stacked.drawn_heads`.
      evaluate: a job and its placed adapters in, the metrics of each set out; may raise `train.loop.stop.Stopped`.
      finish: called with a member's index, its result and the metrics of its kept adapters, as soon as it ends.
      keep_best: whether members keep their best adapters instead of the last ones.
      halving: see `train.config.SweepConfig`.
      program: one that is compiled already, perhaps of other members.
    """

    names: Sequence[str]
    jobs: Sequence[Job]
    base: Any
    new: Sequence[str]
    evaluate: Callable[[Job, dict[str, Any]], dict[str, dict[str, float]]]
    finish: Callable[[int, FitResult, Mapping[str, Mapping[str, float]]], None]
    keep_best: bool
    halving: int | None
    program: Program | None = None


def train_round(one: Round, files: RoundFiles, base_records: Sequence[Record], stop: Stop) -> list[MemberState]:
    """Train the members of a round, from the point where it stopped; return how they ended.

    Raises:
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if ``stop`` was requested, after a checkpoint was saved.
    """
    return _RoundLoop(one, files, base_records, stop).run()


class _RoundLoop(Steps):
    """A round in this process."""

    phase = "fit"
    state: RoundState

    def __init__(self, one: Round, files: RoundFiles, base_records: Sequence[Record], stop: Stop):
        self.each = [job.intervals(job.config.fit, job.examples) for job in one.jobs]
        longest = max(self.each, key=lambda intervals: intervals.steps)
        super().__init__(one.jobs[0].layout, longest, one.base, files, stop)
        self.round, self.files, self.state = one, files, files.state
        self.rungs = {} if one.halving is None else rungs(longest, len(one.jobs), one.halving)
        self.rates = rates_of(one.jobs)
        self.stacking = Stacking.of(one.jobs, one.new)
        self.key = random_key(0, "sweep")  # checkpoints have one; those of the members follow from their seeds
        self.program = self.make_program()
        if self.state.step:
            self.train_state = files.restore(self.layout, self.program.state_like(), self.key)
        else:
            self.train_state = self.program.make_state()
        files.begin(base_records)
        self.step, self.feed = self.dispatch, self.make_feed()

    def make_program(self) -> Program:
        """The program of the members in the slots."""
        slots, given = self.state.slots, self.round.program
        jobs = [self.round.jobs[i] for i in slots]
        if given is not None and [*map(id, given.jobs)] == [*map(id, jobs)]:
            return given
        return Program(jobs, self.base, self.stacking.part(slots))

    def make_feed(self) -> Feed:
        """The batches of the members in the slots."""
        return Feed(self.program.input, on_host=self.layout.on_host)

    def dispatch(self, train_state: Any, base: Any, batch: Batch, key: jax.Array) -> Any:
        """One step of the members that are still trained."""
        step, slots = self.state.step, self.state.slots
        active = [self.state.members[i].ended is None and step < self.each[i].steps for i in slots]
        return self.program.step(train_state, batch, self.program.settings(self.rates[step, slots], np.array(active)))

    def is_over(self) -> bool:
        return not self.state.live

    def result(self) -> list[MemberState]:
        self.files.checkpoints.wait()
        return self.state.members

    # Metrics of a step

    def take(self, done: InFlight, metrics: dict[str, np.ndarray], seconds: float, waited: float) -> None:
        """Add each member's metrics to its averages, and log its records; one with NaN or infinity ends."""
        losses, counts = [], self.program.counts(done.step - 1)
        for slot, i in enumerate(self.state.slots):
            member, intervals = self.state.members[i], self.each[i]
            if member.ended is not None or done.step > intervals.steps:
                continue
            values = {name: float(column[slot]) for name, column in metrics.items()}
            if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
                text = f"{DIVERGED} in step {done.step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
                member.ended, member.diverged = text, True
                self.progress.say(f"{self.round.names[i]} {text}")
                continue
            losses.append(values["loss"])
            loop = member.loop
            loop.step, loop.seconds = done.step, self.state.seconds
            for averages in (loop.since_log, loop.since_epoch):
                averages.add(values, counts[slot], seconds if done.is_timed else None, waited)
            if not intervals.is_eval_due(done.step):
                self.log(i, {})
        if losses and self.intervals.is_log_due(done.step):
            span = f"loss {min(losses):.4f}" + (f" to {max(losses):.4f}" if len(losses) > 1 else "")
            speed = [f"{done.counts.examples / seconds:,.0f} examples/s"] if done.is_timed and seconds > 0 else []
            parts = [f"{span}, {len(losses)} members", *speed]
            self.progress.show_line(done.step, parts, self.estimate.left(done.step, self.intervals))

    def log(self, i: int, metrics: dict[str, float]) -> None:
        """Log the records of a member that are due. The last one includes the ``metrics`` of an evaluation."""
        loop = self.state.members[i].loop
        for record in loop.take_records(loop.step, self.each[i], metrics):
            self.files.members[i].log({"phase": self.phase} | record)

    # Evaluations

    def evaluate_if_due(self) -> bool:
        """Evaluate the members for which it is time, and let those go that are done, out of patience or left behind."""
        step = self.state.step
        # Of all in the program: it is not known yet which diverged, and what happens at a step must not depend on that.
        due = [i for i in self.state.slots if step <= self.each[i].steps and self.each[i].is_eval_due(step)]
        if not due:
            return False
        self.collect(0)
        self.state.eval_pending = True
        due = [i for i in due if self.state.members[i].ended is None]
        with contextlib.nullcontext() if self.estimate.eval_seconds else self.compiling():
            measured = {i: self.round.evaluate(self.round.jobs[i], self.adapters(i)) for i in due}
        self.state.eval_pending = False
        self.estimate.eval_seconds, _ = self.lap()
        for i, sets in measured.items():
            self.add_measured(i, sets)
        if step in self.rungs and due:
            self.leave_behind(due, self.rungs[step])
        for i in due:
            if self.state.members[i].ended is not None:
                self.finish(i)
        self.show_evaluated(due)
        self.make_smaller()
        self.clock = time.perf_counter()
        return False

    def adapters(self, i: int) -> dict[str, Any]:
        """A member's adapters, to evaluate."""
        return self.program.adapters(self.train_state, self.state.slots.index(i))

    def add_measured(self, i: int, sets: dict[str, dict[str, float]]) -> None:
        """Add a member's evaluation: its records, its best adapters, and whether it goes on."""
        member, job = self.state.members[i], self.round.jobs[i]
        loop, metric = member.loop, job.primary_metrics[-1]
        found = {f"{name}_{key}": value for name, metrics in sets.items() for key, value in metrics.items()}
        self.log(i, found)
        is_best = loop.add_eval(metric, found[metric.name])
        if is_best or not self.round.keep_best:
            member.measured = sets
        if is_best and self.round.keep_best:
            self.keep(i)
        steps, config = self.each[i].steps, job.config.fit
        if loop.step == steps or config.patience is not None and loop.evals_since_best >= config.patience:
            member.ended = loop.why_ended(steps, config.epochs, metric, self.phase)

    def leave_behind(self, due: Sequence[int], keep: int) -> None:
        """End all but the best members, by their newest metric."""
        left = [i for i in due if self.state.members[i].ended is None]
        metric = self.round.jobs[0].primary_metrics[-1]
        for j in left_behind([self.state.members[i].loop.metric for i in left], keep, metric):
            self.state.members[left[j]].ended = f"dropped: {keep} of {len(left)} were better (sweep.halving)"

    def keep(self, i: int) -> None:
        """Write a member's adapters to its directory."""
        slot = self.state.slots.index(i)
        self.files.members[i].save(self.program.own_adapters(self.train_state, slot))

    def finish(self, i: int) -> None:
        """Finish the directory of a member that ended."""
        member = self.state.members[i]
        loop, kept, metric = member.loop, member.loop.step, member.loop.metric
        if self.round.keep_best and loop.best_step is not None:
            kept, metric = loop.best_step, loop.best_metric
        else:
            self.keep(i)
        loop.planned_epochs = [[0, self.round.jobs[i].config.fit.epochs]]
        self.round.finish(i, FitResult({}, loop, str(member.ended), kept, metric), member.measured)

    def show_evaluated(self, due: Sequence[int]) -> None:
        """Print the best of the evaluated members, and how many go on."""
        metric = self.round.jobs[0].primary_metrics[-1]
        values = {i: value for i in due if (value := self.state.members[i].loop.metric) is not None}
        if not values:
            return
        order = sorted(values, key=lambda i: values[i], reverse=metric.higher_is_better)
        parts = [f"{metric.name} {values[order[0]]:.4f} ({self.round.names[order[0]]})"]
        parts += [f"worst {values[order[-1]]:.4f}"] if len(order) > 1 else []
        left = len(self.state.live)
        parts += [f"{left} of {len(self.state.members)} go on"] if 0 < left < len(self.state.members) else []
        self.progress.show_line(self.state.step, parts, self.estimate.left(self.state.step, self.intervals))

    def make_smaller(self) -> None:
        """Continue with a smaller program once at most half of the members in this one are trained."""
        live, slots = self.state.live, self.state.slots
        if not live or len(live) > len(slots) // 2:
            return
        kept = [slots.index(i) for i in live]
        self.state.slots = live
        self.program = self.make_program()
        self.train_state = self.program.part_of(self.train_state, kept)
        self.feed.close()
        self.feed = self.make_feed()
        self.compiled.clear()
