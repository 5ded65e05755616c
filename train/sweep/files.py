"""The files of a sweep: a run directory for each member, and checkpoints of the round that is trained.

    runs/digits-lora-sweep-20261128-120000/
      config.json, data.json   as of a run; the configuration of all members
      sweep.json               how members are divided into programs, and the rounds that are done
      checkpoints/0/           checkpoints of the first round, while it is trained
      members/rank4-seed0/     a run directory, see `train.rundir.directory`; without checkpoints
      sweep.png                the metric over the swept values
      summary.json             the results of all members
      SHA256SUMS               of configuration, data and summary

A member's directory is finished as soon as it is no longer trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.files.buckets import is_in_bucket, remove_folder
from jlora.files.checksums import write_sums
from jlora.files.drafts import drafts
from jlora.files.json_files import json_text, read_json, write_json
from train.compute.layouts import Layout
from train.compute.step import TrainState
from train.config import SaveConfig
from train.job import Job
from train.loop.checkpoints import Checkpoints
from train.report import writers
from train.rundir.claim import ClaimedDirectory
from train.rundir.codec import to_json
from train.rundir.directory import RunDirectory
from train.rundir.records import Record, open_records
from train.sweep.state import MemberState, RoundState


class SweepDirectory:
    """What a sweep writes besides the directories of its members."""

    def __init__(self, directory: ClaimedDirectory):
        self.run = directory
        self.members = directory.members
        self.picture = directory.path / "sweep.png"
        self._file = directory.path / "sweep.json"
        self.stored: dict[str, Any] = read_json(self._file) if self._file.is_file() else {"at_once": {}, "rounds": {}}

    def checkpoints(self, number: int) -> Path:
        """The folder of a round's checkpoints."""
        return self.run.checkpoints / str(number)

    def done(self, number: int) -> list[MemberState] | None:
        """The members of a round that is done."""
        found = self.stored["rounds"].get(str(number))
        return None if found is None else [MemberState.from_json(one) for one in found]

    def store_done(self, number: int, members: Sequence[MemberState]) -> None:
        """Note a round as done, and delete its checkpoints."""
        self.stored["rounds"][str(number)] = [one.to_json() for one in members]
        self.store()
        folder = self.checkpoints(number)
        remove_folder(folder, first="") if is_in_bucket(folder) else shutil.rmtree(folder, ignore_errors=True)

    def store(self) -> None:
        """Write sweep.json."""
        write_json(self._file, self.stored)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the checksums, then the summary, which marks the sweep as finished."""
        run = self.run
        with drafts(run.summary) as (draft,):
            draft.write_text(json_text(summary, sort_keys=False))
            write_sums(run.path, {one.name: one for one in (run.config, run.data)} | {run.summary.name: draft})


class MemberFiles:
    """The directory of a member: a normal run directory once it is finished.

    Attributes:
      directory: its files.
      records: its metrics.
    """

    def __init__(self, path: Path, job: Job):
        self.directory, self.job = RunDirectory(path), job
        self.records = open_records(self.directory.metrics)
        self._writers = writers.Writers(())

    def begin(self, state: MemberState, base_records: Sequence[Record]) -> None:
        """Write what is known before training; of a resumed member, drop what came after the checkpoint."""
        directory, config = self.directory, self.job.config
        directory.path.mkdir(parents=True, exist_ok=True)
        if state.ended is not None:
            return
        for file in (directory.summary, directory.sums):
            file.unlink(missing_ok=True)
        directory.write_config(config)
        directory.write_data(self.job.provenance)
        directory.write_plan(str(self.job.plan))
        loop = state.loop
        self._writers = writers.open_writers(config.log, directory.path, to_json(config), loop.step + 1)
        self.records.cut(loop.metrics_bytes, loop.metrics_digest)
        for record in () if loop.step else base_records:
            self.log(record)

    def log(self, record: Record) -> None:
        """Append a record to the metrics."""
        self.records.write(record)
        self._writers.write(record)

    def save(self, adapters: Mapping[str, Any]) -> None:
        """Keep these adapters."""
        jlora.save(self.directory.adapters, adapters)

    def close(self, *, failed: bool) -> None:
        self._writers.close(failed=failed)
        self.records.close()


class RoundFiles:
    """The checkpoints of a round and the files of its members; a context manager that closes them.

    Attributes:
      members: their files, in the order of the round.
      state: of the round, at the step where training starts.
      command: the command that resumes, for messages.
    """

    command = "the same command"

    def __init__(self, folder: Path, saving: SaveConfig, members: Sequence[MemberFiles], identity: Any):
        """Open the files of a round; only reads.

        Args:
          identity: the sweep's configuration as JSON, kept in checkpoints.
        """
        self.members, self.saving, self._identity = members, saving, identity
        self.checkpoints = Checkpoints(folder, saving, keep_best=False, read_state=RoundState.from_json)
        steps = self.checkpoints.steps()
        self.state = self.checkpoints.loop_state(steps[-1]) if steps else RoundState.of(len(members))

    def __enter__(self) -> RoundFiles:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for one in self.members:
            one.close(failed=error is not None)
        self.checkpoints.close()

    def begin(self, base_records: Sequence[Record]) -> None:
        """Open everything for writing. After `restore`, so that an error changes nothing."""
        for one, state in zip(self.members, self.state.members, strict=True):
            one.begin(state, base_records)
        self.checkpoints.begin(self.state.step)

    def restore(self, layout: Layout, like: TrainState, key: jax.Array) -> TrainState:
        """The arrays of the checkpoint; as `Checkpoints.restore`, but with an axis of members."""
        state, _ = self.checkpoints.restore(self.state.step, layout, like, key)
        return state

    def save(self, layout: Layout, train_state: TrainState, key: jax.Array) -> None:
        """Write a checkpoint in the background; raises as `Checkpoints.save`."""
        for one, state in zip(self.members, self.state.members, strict=True):
            state.loop.metrics_bytes, state.loop.metrics_digest = one.records.sync()
        self.checkpoints.save(layout, train_state, self.state, key, self._identity)
