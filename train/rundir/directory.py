"""The files of a run directory: their names, and their reading and writing.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration: defaults, overrides, and values taken from the data
      data.json        provenance: sources, files, rows, digests
      plan.txt         the adapted weights and their adapters
      metrics.jsonl    one line per epoch of each training, and some in between; see `train.rundir.records`
      checkpoints/     training checkpoints; see `train.loop.checkpoints`
      base/            the base, if it was trained from scratch; see `train.rundir.bases`
      adapters/        the kept adapters, written by `jlora.save`
      curves.png       loss and metrics over the steps, if matplotlib is installed
      summary.json     the final metrics
      SHA256SUMS       of the files that make up a finished run: all but checkpoints and curves
      run.lock         held by the training process

The summary is written last: a run directory without one is unfinished.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.files.buckets import located
from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.drafts import drafts
from jlora.files.json_files import json_text, read_json, write_json
from jlora.models import TensorError
from train.config import ConfigError, TrainConfig
from train.rundir.codec import from_json, to_json

DRAFT = ".draft"
"""The suffix of files being written."""


class RunDirectory:
    """A run directory, read and written file by file. Constructing one touches no file.

    Attributes:
      path: the directory, local or in a bucket; see `jlora.files.buckets`.
      config, data, plan, metrics, checkpoints, base, adapters, curves, summary, sums, lock_file: its files.
      members: of a sweep, the run directories of its trainings.
    """

    def __init__(self, path: Path):
        self.path = path = located(path)
        self.config = path / "config.json"
        self.data = path / "data.json"
        self.plan = path / "plan.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.base = path / "base"
        self.adapters = path / "adapters"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.sums = path / SUMS
        self.lock_file = path / "run.lock"
        self.members = path / "members"

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """The names of the files in it, without the lock and without drafts."""
        found = sorted(one.name for one in self.path.iterdir()) if self.path.is_dir() else []
        return [name for name in found if name != self.lock_file.name and not name.endswith(DRAFT)]

    @property
    def is_finished(self) -> bool:
        return self.summary.is_file()

    @property
    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("[0-9]*"))

    def read_config_json(self) -> dict[str, Any]:
        """The run's configuration as written by `to_json`, possibly of an earlier version.

        Raises:
          ConfigError: if it is missing, cannot be read, or is not a run's.
        """
        if not self.config.is_file():
            found = sorted(str(file.parent) for file in self.path.parent.glob(f"*/{self.summary.name}"))
            raise ConfigError(
                f"{self} is not a run directory: it has no {self.config.name}; "
                + (f"next to it there are {', '.join(found)}" if found else "python -m train creates one below runs/")
            )
        config = _read(self.config)
        if (kind := config.get("kind")) != TrainConfig.__name__:
            raise ConfigError(
                f"{self} is not a run directory: its {self.config.name} is of something else, such as a checkpoint "
                f"(kind: got {kind!r}, expected {TrainConfig.__name__!r})"
            )
        return config

    def read_single_json(self) -> dict[str, Any]:
        """`read_config_json` of a single run.

        Raises:
          ConfigError: as there; and for a sweep, naming its best runs.
        """
        written = self.read_config_json()
        if self.members.is_dir():
            raise ConfigError(f"{self} holds a sweep, expected a single run; {self._best_runs()}")
        return written

    def read_config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
          ConfigError: as `read_single_json`; and listing each field that this version does not accept.
        """
        written = self.read_single_json()
        try:
            config = from_json(TrainConfig, written)
            config.check()
        except ValueError as error:
            raise ConfigError(f"{self.config} is not a configuration of this version: {error}") from error
        return config

    def _best_runs(self) -> str:
        """Where the best runs of a sweep are."""
        if not self.is_finished:
            return f"those that are finished are below {self.members}. The same command resumes the sweep"
        summary = self.read_summary()
        names = summary.get("best_of_data", {"": summary["best"]}).values()
        found = ", ".join(str(self.members / name) for name in names if name is not None)
        return f"its best is {found}" if found else "none of its runs has a result"

    def read_data(self) -> dict[str, Any]:
        """The provenance of each set by name; empty in runs of earlier versions, which lack the file."""
        return _read(self.data) if self.data.is_file() else {}

    def read_plan(self) -> str:
        """The plan; empty in runs of earlier versions, which lack the file."""
        return self.plan.read_bytes().decode(errors="replace").rstrip() if self.plan.is_file() else ""

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
          ConfigError: if it cannot be read.
        """
        return _read(self.summary)

    def check_sums(self) -> None:
        """Check that a finished run's files are unchanged.

        Raises:
          ConfigError: listing each changed file.
        """
        try:
            check_sums(self.path)
        except TensorError as error:
            raise ConfigError(str(error)) from error

    def write_config(self, config: TrainConfig) -> None:
        write_json(self.config, to_json(config), sort_keys=False)

    def write_data(self, data: Mapping[str, Any]) -> None:
        write_json(self.data, data, sort_keys=False)

    def write_plan(self, plan: str) -> None:
        self.plan.write_text(f"{plan}\n", encoding="utf-8")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the checksums, then the summary, which marks the run as finished."""
        used = [self.config, self.data, self.metrics, self.plan, self.adapters / SUMS]
        used += [self.base / SUMS] * self.base.is_dir()  # adapters and base have their own checksums
        sums = {file.relative_to(self.path).as_posix(): file for file in used}
        with drafts(self.summary) as (draft,):
            draft.write_text(json_text(summary, sort_keys=False))
            write_sums(self.path, {**sums, self.summary.name: draft})

    def reopen(self, config: TrainConfig) -> None:
        """Reopen a finished run with this configuration; other files stay until they are replaced."""
        self.summary.unlink()
        self.sums.unlink()
        self.write_config(config)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except TensorError as error:
        raise ConfigError(str(error)) from error
