"""The directory of a run, resumed or new, used by one run at a time."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from jlora.files.buckets import errors_of, is_in_bucket
from jlora.messages import bullets
from train.compute.processes import first_decides, is_first, say
from train.config import ConfigError, TrainConfig
from train.rundir.changes import LATER, MORE, config_changes, data_changes
from train.rundir.codec import flat
from train.rundir.directory import RunDirectory
from train.rundir.lock import Lock, lock


class ClaimedDirectory(RunDirectory):
    """A run directory reserved for this run. A context manager that releases it.

    Attributes:
      finished: whether it holds a finished run.
      extends: whether this run extends it.
    """

    def __init__(self, path: Path, finished: bool, extends: bool, lock: Lock | None):
        super().__init__(path)
        self.finished, self.extends, self._lock = finished, extends, lock

    def __enter__(self) -> ClaimedDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def begin(self, config: TrainConfig, data: Mapping[str, Any]) -> None:
        """Write the configuration and the data's provenance; a finished run's stay until it is reopened."""
        if is_first() and not self.finished:
            self.write_config(config)
            self.write_data(data)


def claim(config: TrainConfig, data: Mapping[str, Any]) -> ClaimedDirectory:
    """Find or create the directory for a configuration, and lock it. The first process chooses; no file changes.

    Args:
      data: the provenance of the examples, as JSON.

    Raises:
      ConfigError: if the directory holds another run, listing the differing fields, or a run on other data, or other
        files; if another run uses it; or if it cannot be created.
    """
    locks: list[Lock] = []

    def choose() -> str:
        try:
            with errors_of(config.run_dir or ""):
                directory = _choose(config, data)
                if not is_in_bucket(directory.path):
                    directory.path.mkdir(parents=True, exist_ok=True)
                locks.append(lock(directory))
                extends = _check_same_run(directory, config, data)
        except OSError as error:
            raise ConfigError(f"run_dir: {error}; expected a directory that is writable; pass --run-dir DIR") from error
        return json.dumps([str(directory), directory.is_finished, extends])

    try:
        path, finished, extends = json.loads(first_decides(choose))
    except ConfigError:
        for held in locks:
            held.release()
        raise
    return ClaimedDirectory(Path(path), finished, extends, locks[0] if locks else None)


def _choose(config: TrainConfig, data: Mapping[str, Any]) -> RunDirectory:
    path = config.run_dir or (_resumable(config, data) if config.resume in (None, "auto") else None)
    directory = RunDirectory(path or _new_below_runs(config))
    names = directory.names()
    if names and directory.config.name not in names:
        raise ConfigError(
            f"run_dir: {directory} holds {', '.join(names[:5])} and no run (it has no {directory.config.name}); "
            "expected a run of this configuration, an empty directory, or a path that does not exist yet; pass another "
            "--run-dir"
        )
    if names and config.resume == "never":
        raise ConfigError(
            f"run_dir: {directory} holds a run, and resume is never; pass another --run-dir, or no --resume to resume "
            "this run"
        )
    if not names and isinstance(config.resume, int):
        raise ConfigError(
            f"resume: got step {config.resume}, and there is no run in {directory}; pass the --run-dir of one"
        )
    return directory


def _check_same_run(directory: RunDirectory, config: TrainConfig, data: Mapping[str, Any]) -> bool:
    """Check that the directory holds this run, or none; return whether this extends a finished run."""
    if not directory.names():
        return False
    finished = directory.is_finished
    changed = config_changes(directory.read_config_json(), config)
    extends = finished and any(name in changed for name in MORE)
    if wrong := [line for name, line in changed.items() if name not in LATER or finished and not extends]:
        raise ConfigError(
            f"run_dir: {directory} holds {'a finished run' if finished else 'a run'} with another configuration:"
            f"{bullets(wrong)}\nExpected the same values, to resume it; pass these, or another --run-dir"
        )
    if changed := data_changes(directory, data):
        raise ConfigError(
            f"run_dir: {directory} holds a run on other data:{bullets(changed)}\nExpected the same data, to resume it; "
            "restore the files as they were, or pass another --run-dir to train on these"
        )
    if extends:
        directory.check_sums()
    elif finished and isinstance(config.resume, int):
        raise ConfigError(f"resume: got step {config.resume}, and {directory} is finished; pass another --run-dir")
    return extends


def _below_runs(config: TrainConfig) -> Path:
    return Path("runs") / f"{config.name}-{config.mode}-{'sweep' if config.sweep else f'seed{config.seed}'}"


def _new_below_runs(config: TrainConfig) -> Path:
    """A new directory below runs/, named after the configuration and the time."""
    stem = _below_runs(config)
    name = f"{stem.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(2):
        path = stem.with_name(name)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another run started in the same second
            name = f"{name.rsplit('.', 1)[0]}.{number}"
    raise AssertionError


def _resumable(config: TrainConfig, data: Mapping[str, Any]) -> Path | None:
    """The newest run below runs/ that this configuration can resume: one with a checkpoint, not in use by a process.

    That is an unfinished run of the same configuration; with ``resume="auto"`` also one that differs in `LATER`, and a
    finished run of fewer epochs. Reports runs skipped because their data changed.
    """
    stem, auto = _below_runs(config), config.resume == "auto"
    for path in sorted(stem.parent.glob(f"{stem.name}-*"), reverse=True):
        directory = RunDirectory(path)
        finished = directory.is_finished
        if finished and not auto or not directory.has_checkpoints:
            continue
        try:
            written = directory.read_config_json()
            if not {*config_changes(written, config)} <= {*(LATER if auto else ())}:
                continue
            if finished and flat(written)["fit.epochs"] >= config.fit.epochs:
                continue
            if changed := data_changes(directory, data):
                say(f"{path} is not resumed, its data changed:{bullets(changed)}\n")
                continue
            with filelock.FileLock(directory.lock_file, timeout=0):
                return path
        except (ConfigError, filelock.Timeout):
            continue
    return None
