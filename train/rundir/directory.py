"""The files of a run directory: their names, and how each is read and written.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration: defaults, overrides, and what was taken from the data
      data.json        what was read: sources, files, rows, digests
      plan.txt         which weights are adapted, and how
      metrics.jsonl    a line for each epoch of each training, and some in between; see `train.rundir.records`
      checkpoints/     what the training resumes from; see `train.loop.checkpoints`
      base/            the base, if it was trained from scratch; see `train.rundir.bases`
      adapters/        the adapters that were kept, as `jlora.save` writes them
      curves.png       loss and metrics over the steps, if matplotlib is installed
      summary.json     the final metrics
      SHA256SUMS       of the files that a finished run is used by: all but checkpoints and curves
      run.lock         held by the process that trains

The summary is written last: a run directory without one is unfinished.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.json_files import read_json, write_json
from jlora.models import TensorError
from train.config import ConfigError, TrainConfig
from train.rundir.codec import from_json, to_json

DRAFT = ".draft"
"""How the name of a file ends that is still being written."""


class RunDirectory:
    """A run directory, read and written file by file. Making one touches no file.

    Attributes:
      path: of the directory.
      config, data, plan, metrics, checkpoints, base, adapters, curves, summary, sums, lock_file: of its files.
    """

    def __init__(self, path: Path):
        self.path = path
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
        """The run's configuration as `to_json` wrote it, maybe in an earlier version.

        Raises:
          ConfigError: if there is none, it cannot be read, or it is not a run's.
        """
        if not self.config.is_file():
            found = sorted(str(file.parent) for file in self.path.parent.glob(f"*/{self.summary.name}"))
            raise ConfigError(
                f"{self} is not a run directory: it has no {self.config.name}; "
                + (f"next to it there are {', '.join(found)}" if found else "python -m train makes one below runs/")
            )
        config = _read(self.config)
        if (kind := config.get("kind")) != TrainConfig.__name__:
            raise ConfigError(
                f"{self} is not a run directory: its {self.config.name} is of something else, such as a checkpoint "
                f"(kind: got {kind!r}, expected {TrainConfig.__name__!r})"
            )
        return config

    def read_config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
          ConfigError: as `read_config_json`; and naming each field that this version does not accept.
        """
        written = self.read_config_json()
        try:
            config = from_json(TrainConfig, written)
            config.check()
        except ValueError as error:
            raise ConfigError(f"{self.config} is not a configuration of this version: {error}") from error
        return config

    def read_data(self) -> dict[str, Any]:
        """What was read, by the names of the sets; empty in runs of earlier versions, which have no such file."""
        return _read(self.data) if self.data.is_file() else {}

    def read_plan(self) -> str:
        """The plan; empty in runs of earlier versions, which have no such file."""
        return self.plan.read_text(encoding="utf-8", errors="replace").rstrip() if self.plan.is_file() else ""

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
          ConfigError: if it cannot be read.
        """
        return _read(self.summary)

    def check_sums(self) -> None:
        """Check that a finished run's files are as they were written.

        Raises:
          ConfigError: naming each file that is not.
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
        """Write the sums, then the summary, which makes the run a finished one."""
        draft = self.summary.with_name(self.summary.name + DRAFT)
        write_json(draft, summary, sort_keys=False)
        used = [self.config, self.data, self.metrics, self.plan, self.adapters / SUMS]
        used += [self.base / SUMS] * self.base.is_dir()  # adapters and base have sums of their own
        sums = {file.relative_to(self.path).as_posix(): file for file in used}
        write_sums(self.path, {**sums, self.summary.name: draft})
        os.replace(draft, self.summary)

    def reopen(self, config: TrainConfig) -> None:
        """Make a finished run an unfinished one with this configuration; other files stay until they are replaced."""
        self.summary.unlink()
        self.sums.unlink()
        self.write_config(config)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except TensorError as error:
        raise ConfigError(str(error)) from error
