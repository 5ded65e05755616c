"""A sweep, from its configuration to its summary: trains its members, and compares them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jlora.files.buckets import download, is_in_bucket
from jlora.messages import table
from train.compute.processes import say
from train.config import ConfigError, TrainConfig
from train.experiment import frozen_base, session
from train.job import Job, make_jobs
from train.loop.evaluate import Measure, make_measure
from train.loop.loop import FitResult
from train.loop.stop import Stop
from train.pretrain import Base
from train.report import console
from train.rundir.bases import copy_base, has_base
from train.rundir.changes import LATER, config_changes
from train.rundir.claim import ClaimedDirectory, claim
from train.rundir.codec import to_json
from train.rundir.directory import RunDirectory
from train.rundir.records import Record, read_records
from train.summary import make_summary, print_start
from train.sweep.files import MemberFiles, RoundFiles, SweepDirectory
from train.sweep.halving import rungs
from train.sweep.loop import Round, train_round
from train.sweep.members import Member, members
from train.sweep.picture import draw_sweep
from train.sweep.program import Program
from train.sweep.results import FINISHED, Result, sweep_summary, sweep_table, winners
from train.sweep.rounds import groups_of, largest_program, parts_of
from train.sweep.stacked import drawn_heads, own_heads
from train.sweep.state import MemberState

Metrics = Mapping[str, Mapping[str, float]]


def run_sweep(config: TrainConfig) -> dict[str, Any]:
    """Train the members of ``config.sweep``; print the progress and write the directory of the sweep.

    Resumes a stopped sweep.

    Returns:
      The summary, as in ``summary.json``; see `train.sweep.results.sweep_summary`.

    Raises:
      ConfigError, CheckpointError, Stopped: as `train.experiment.run`. A member that diverges ends alone.
    """
    with session(config) as stop:
        began = time.perf_counter()
        if jax.process_count() > 1:
            raise ConfigError(
                f"sweep: got {jax.process_count()} processes, expected one: a sweep uses the devices of one process; "
                "start it on one host, or train the members one by one"
            )
        found = members(config)
        jobs = make_jobs([member.config for member in found], stop.check)
        config = dataclasses.replace(config, task=jobs[0].config.task)
        if config.sweep.halving is not None:  # raises now, and not after the base is loaded
            rungs(jobs[0].intervals(config.fit, jobs[0].examples), len(jobs), config.sweep.halving)
        provenance = {
            f"{member.values['data']} {name}" if "data" in member.values else name: one
            for member, job in zip(found, jobs, strict=True)
            for name, one in job.provenance.items()
        }
        with claim(config, provenance) as directory:
            if directory.finished:
                if directory.extends:
                    raise ConfigError(
                        f"run_dir: {directory} holds a finished sweep, which is not trained further; pass another "
                        "--run-dir, or train on with the configuration of its best member"
                    )
                say(f"{directory} is finished: nothing is left to train. Pass another --run-dir to train it again")
                directory.check_sums()
                return directory.read_summary()
            _check_unchanged(directory, config)
            directory.begin(config, provenance)
            return _Sweep(config, found, jobs, directory, stop, began).run()


def _check_unchanged(directory: ClaimedDirectory, config: TrainConfig) -> None:
    """Raises a ConfigError for changes that a single run may resume with."""
    if directory.config.is_file():
        changed = config_changes(directory.read_config_json(), config)
        if lines := [line for name, line in changed.items() if name in LATER]:
            raise ConfigError(f"run_dir: {'; '.join(lines)}; a sweep resumes as it was; pass the same values")


class _Sweep:
    """A sweep in this process."""

    def __init__(
        self,
        config: TrainConfig,
        found: Sequence[Member],
        jobs: Sequence[Job],
        directory: ClaimedDirectory,
        stop: Stop,
        began: float,
    ):
        self.config, self.found, self.stop, self.began = config, found, stop, began
        self.sweep = SweepDirectory(directory)
        paths = [self.sweep.members / member.name for member in found]
        self.jobs = [_at(path, job) for path, job in zip(paths, jobs, strict=True)]
        self.files = [MemberFiles(path, job) for path, job in zip(paths, self.jobs, strict=True)]
        self.keep_best = config.keeps_best
        buckets = tuple(sorted({length for job in jobs for length in job.buckets}))
        first = jobs[0]
        self.measure: Measure = make_measure(
            first.layout, first.network.forward, first.task, config.eval_batch_size, buckets, stop
        )
        self.base_metrics: dict[Any, Metrics] = {}

    def run(self) -> dict[str, Any]:
        """Train all rounds, and finish the sweep."""
        print_start(self.jobs[0])
        say(f"{self._describe()}\n")
        groups = groups_of(self.jobs)
        numbers = iter(range(len(self.jobs)))
        states: dict[int, MemberState] = {}
        for place, group in enumerate(groups):
            states |= self._train_group(str(place), group, numbers)
        results = [self._result(i, states[i]) for i in range(len(self.jobs))]
        return self._finish(results)

    def _train_group(self, place: str, group: Sequence[int], numbers: Any) -> dict[int, MemberState]:
        """Train the members of a group, which have one base; in rounds, if not all of them fit in memory."""
        at_once, jobs = self.sweep.stored["at_once"], [self.jobs[i] for i in group]
        base, records = self._base(group)
        self.base_metrics = {}
        new = drawn_heads(jobs[0], base.params)
        program = None
        if place not in at_once:
            program = largest_program(jobs, base.params, new, self.config.sweep.at_once)
            at_once[place] = len(program.jobs)
            self.sweep.store()
        found: dict[int, MemberState] = {}
        for part in parts_of(group, at_once[place]):
            number = next(numbers)
            if (done := self.sweep.done(number)) is None:
                if len(part) < len(self.jobs):
                    say(f"round {number + 1}: {', '.join(self.found[i].name for i in part)}")
                done = self._train_part(part, number, base, new, records, program)
                self.sweep.store_done(number, done)
            found |= dict(zip(part, done, strict=True))
        return found

    def _train_part(
        self,
        part: Sequence[int],
        number: int,
        base: Base,
        new: Sequence[str],
        records: Sequence[Record],
        program: Program | None,
    ) -> list[MemberState]:
        def metrics(job: Job, adapters: dict[str, Any] | None) -> dict[str, dict[str, float]]:
            return {
                name: job.task.metrics(self.measure(base.params, adapters, examples))
                for name, examples in job.test.items()
            }

        def of_base(job: Job) -> Any:
            """What the metrics of a member's base depend on."""
            return tuple(map(id, job.test.values())), job.config.seed if new else None

        def evaluate(job: Job, adapters: dict[str, Any]) -> dict[str, dict[str, float]]:
            if of_base(job) not in self.base_metrics:  # here, because a stop may interrupt it
                self.base_metrics[of_base(job)] = metrics(job, own_heads(job, base.params, new))
            return metrics(job, adapters)

        def finish(place: int, fitted: FitResult, measured: Metrics) -> None:
            i = part[place]
            self._finish_member(
                i, base, fitted, {"base": self.base_metrics[of_base(self.jobs[i])], "adapted": measured}
            )

        one = Round(
            names=[self.found[i].name for i in part],
            jobs=[self.jobs[i] for i in part],
            base=base.params,
            new=new,
            evaluate=evaluate,
            finish=finish,
            keep_best=self.keep_best,
            halving=self.config.sweep.halving,
            program=program,
        )
        files = RoundFiles(
            self.sweep.checkpoints(number), self.config.save, [self.files[i] for i in part], to_json(self.config)
        )
        with files:
            if files.state.step:
                say(f"resuming {self.sweep.run} after step {files.state.step}")
            return train_round(one, files, records, self.stop)

    def _base(self, group: Sequence[int]) -> tuple[Base, list[Record]]:
        """The base of a group, and the records of its training; each member keeps a copy of one from scratch."""
        job, kept = self.jobs[group[0]], self.files[group[0]].directory.base
        kept.parent.mkdir(parents=True, exist_ok=True)
        records: list[Record] = []
        base = frozen_base(job, kept, self.measure, records.append, self.stop)
        for i in group[1:] if job.network.load is None else ():
            own = self.files[i].directory.base
            if not has_base(own):
                own.parent.mkdir(parents=True, exist_ok=True)
                copy_base(download(kept) if is_in_bucket(kept) else kept, own)
        return base, records

    def _finish_member(self, i: int, base: Base, fitted: FitResult, metrics: Mapping[str, Metrics]) -> None:
        """Write a member's summary, which makes its directory that of a finished run."""
        job, files = self.jobs[i], self.files[i]
        directory = files.directory
        records = files.records.read()
        summary = {
            **make_summary(job, base, fitted, records, keep_best=self.keep_best),
            "metrics": metrics,
            "differing_predictions": {},
            "run_dir": str(directory),
            "seconds": round(time.perf_counter() - self.began, 2),
        }
        directory.finish(summary)

    def _result(self, i: int, state: MemberState) -> Result:
        loop, directory = state.loop, self.files[i].directory
        metric = loop.best_metric if self.keep_best else loop.metric
        done = loop.step == self.jobs[i].intervals(self.jobs[i].config.fit, self.jobs[i].examples).steps
        return Result(
            self.found[i].name,
            self.found[i].values,
            FINISHED if done and not state.diverged else str(state.ended),
            loop.step,
            None if state.diverged else metric,
            _last_loss(directory),
            None if state.diverged else str(directory),
        )

    def _finish(self, results: Sequence[Result]) -> dict[str, Any]:
        metric = self.jobs[0].primary_metrics[-1]
        seconds = time.perf_counter() - self.began
        summary = sweep_summary(
            results, metric.name, metric.higher_is_better, seconds, run_dir=str(self.sweep.run), name=self.config.name
        )
        draw_sweep(self.sweep.picture, results, metric.name, metric.higher_is_better)
        for best in winners(results, metric.higher_is_better):  # drawing all would take as long as training small ones
            self._draw_curves(self.files[results.index(best)])
        self.sweep.finish(summary)
        say(f"\n{sweep_table(results, metric.name, metric.higher_is_better)}\n")
        if summary["best_run_dir"] is not None:
            say(f"best: {summary['best_run_dir']}")
        say(f"written to {self.sweep.run} in {seconds:.1f} s")
        return summary

    def _draw_curves(self, files: MemberFiles) -> None:
        shown = [metric.name for metric in files.job.primary_metrics]
        console.draw_curves(files.directory.curves, read_records(files.directory.metrics)[0], shown)

    def _describe(self) -> str:
        """The members, by their swept values."""
        given = self.config.sweep.given
        rows = [(name, ", ".join(map(str, values))) for name, values in given.items()]
        return f"{len(self.found)} members\n{table(('swept', 'values'), rows)}"


def _at(path: Path, job: Job) -> Job:
    """A member's job, with its run directory in the configuration."""
    return dataclasses.replace(job, config=dataclasses.replace(job.config, run_dir=path, resume=None))


def _last_loss(directory: RunDirectory) -> float | None:
    """The training loss in the last record of the adapters' training."""
    records = [one for one in read_records(directory.metrics)[0] if one["phase"] == "fit" and "loss" in one]
    return records[-1]["loss"] if records else None
