"""The directory of a run: found again or made anew, and held by one run at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.json_files import read_json
from jlora.messages import bullets
from jlora.models import TensorError
from train.compute.processes import first_decides, is_first, say
from train.config import ConfigError, TrainConfig
from train.rundir import files

HOW = ("cache_dir", "compute", "log", "processes", "resume", "run_dir", "save")
"""Fields that say how a run is computed and watched; what it learns does not depend on them, but for rounding and the
masks of dropout."""

ASIDE = tuple(name for name in HOW if name != "compute")
"""Those of them that tell nothing of its speed and memory either."""

LATER = ("eval_batch_size", "eval_every", "eval_every_steps", "fit.epochs", "fit.patience", "keep", "log_every")
"""Fields that may be others when a run goes on: what it learns does not depend on them, but for the learning rate (see
`train.loop.extend`) and the end."""

MORE = ("fit.epochs", "fit.patience")
"""Those of them for which a finished run is trained further."""

LOCK = "run.lock"
SUMMARY = "summary.json"
DATA = "data.json"
FINISHED = ("config.json", DATA, "metrics.jsonl", "plan.txt", f"adapters/{SUMS}")
"""The files of a finished run whose sums are kept, beside the summary's; adapters have sums of their own."""


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory.

    Attributes:
      path: of the directory.
      finished: whether there is a run in it that came to its end.
      further: whether that one is to be trained further.
      lock: held as long as this process trains; None in processes that do not write.
    """

    path: Path
    finished: bool
    further: bool
    lock: filelock.BaseFileLock | None


def open_run_dir(config: TrainConfig, data: Mapping[str, Any]) -> RunDirectory:
    """The directory that a configuration is to be run in, with its ``config.json``; the first process chooses.

    Args:
      data: what is told of the examples, as JSON.

    Raises:
      ConfigError: if it holds another run, naming the fields that differ, or one on other data, or anything else; if a
        run that is under way holds it; or if it cannot be made.
    """
    locks: list[filelock.BaseFileLock] = []

    def choose() -> str:
        try:
            path, further = _choose(config, data, locks)
        except OSError as error:
            raise ConfigError(f"run_dir: {error}; expected a directory that is writable; pass --run-dir DIR") from error
        return json.dumps([str(path), (path / SUMMARY).is_file(), further])

    path, finished, further = json.loads(first_decides(choose))
    return RunDirectory(Path(path), finished, further, locks[0] if is_first() else None)


def _choose(config: TrainConfig, data: Mapping[str, Any], locks: list[filelock.BaseFileLock]) -> tuple[Path, bool]:
    """The directory, and whether the finished run in it is to be trained further."""
    path = config.run_dir or (_found(config, data) if config.resume in (None, "auto") else None)
    path = path or _new_below_runs(config)
    there = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
    there = [name for name in there if name != LOCK and not name.endswith(".draft")]
    if there and "config.json" not in there:
        raise ConfigError(
            f"run_dir: {path} holds {', '.join(there[:5])} and no run (it has no config.json); expected a run of this "
            "configuration, an empty directory, or none yet; pass another --run-dir"
        )
    if there and config.resume == "never":
        raise ConfigError(
            f"run_dir: {path} holds a run, and resume is never; pass another --run-dir, or no --resume to go on"
        )
    if not there and isinstance(config.resume, int):
        raise ConfigError(f"resume: got step {config.resume}, and there is no run in {path}; pass the --run-dir of one")
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"run_dir: {path} is in use by another process that trains in it; wait for it, or pass another --run-dir. "
            f"If nothing does, the lock of a host that is lost is still on the file server: remove {path / LOCK}"
        ) from None
    locks.append(lock)
    finished = (path / SUMMARY).is_file()
    differing = differences(_read(path / "config.json"), config) if there else {}
    further = finished and any(name in differing for name in MORE)
    if wrong := [line for name, line in differing.items() if name not in LATER or finished and not further]:
        what = "a finished run" if finished else "a run"
        raise ConfigError(
            f"run_dir: {path} holds {what} with another configuration:{bullets(wrong)}\n"
            "Expected the same, to go on with it; pass another --run-dir, or these values"
        )
    if there and (differing := changes(path, data)):
        raise ConfigError(
            f"run_dir: {path} holds a run on other data:{bullets(differing)}\nExpected the same, to go on with it; put "
            "the files back as they were, or pass another --run-dir to train on these"
        )
    if further:
        read_summary(path)  # what is damaged is refused before anything is changed
    elif finished and isinstance(config.resume, int):
        raise ConfigError(f"resume: got step {config.resume}, and {path} is finished; pass another --run-dir")
    elif not finished:
        files.write_json(path / "config.json", files.to_json(config))
        files.write_json(path / DATA, data)
    return path, further


def _below_runs(config: TrainConfig) -> Path:
    return Path("runs") / f"{config.name}-{config.mode}-seed{config.seed}"


def _new_below_runs(config: TrainConfig) -> Path:
    """A new directory under runs/, named after the configuration and the time."""
    stem = _below_runs(config)
    name = f"{stem.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(2):
        path = stem.with_name(name)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # of another that began in this second
            name = f"{name.rsplit('.', 1)[0]}.{number}"
    raise AssertionError


def _found(config: TrainConfig, data: Mapping[str, Any]) -> Path | None:
    """The newest run under runs/ that goes on with this configuration; it has a checkpoint and is not under way.

    That is an unfinished one of the same configuration; where it is asked for, also one that differs in `LATER`, and a
    finished one of fewer epochs. It is told if one is left as it is because its data changed.
    """
    stem, asked = _below_runs(config), config.resume == "auto"
    for path in sorted(stem.parent.glob(f"{stem.name}-*"), reverse=True):
        finished = (path / SUMMARY).exists()
        if finished and not asked or not any(path.glob("checkpoints/[0-9]*")):
            continue
        try:
            written = _read(path / "config.json")
            if not {*differences(written, config)} <= {*(LATER if asked else ())}:
                continue
            if finished and files.flat(written)["fit.epochs"] >= config.fit.epochs:
                continue
            if differing := changes(path, data):
                say(f"{path} is left as it is, its data are others now:{bullets(differing)}\n")
                continue
            with filelock.FileLock(path / LOCK, timeout=0):
                return path
        except (ConfigError, filelock.Timeout):
            continue
    return None


def changes(path: Path, data: Mapping[str, Any]) -> list[str]:
    """The sources that hold something else than when a run began; a line for each.

    Of runs of earlier versions, which have no ``data.json``, nothing is known.
    """
    if not (path / DATA).is_file():
        return []
    then = files.flat(_read(path / DATA))
    return [
        f"data.{name}: {now['source']} has the sha256 {now['digest'][:12]}, and had {str(was)[:12]} ({path / DATA})"
        for name, now in data.items()
        if (was := then.get(f"{name}.digest")) != now["digest"]
    ]


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except TensorError as error:
        raise ConfigError(str(error)) from error


def finish(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary, by which a run is a finished one, and the sums of its files just before."""
    draft = path / f"{SUMMARY}.draft"
    draft.write_text(files.text_of(summary))
    write_sums(path, {**{name: path / name for name in FINISHED}, SUMMARY: draft})
    os.replace(draft, path / SUMMARY)


def reopen(path: Path, config: TrainConfig) -> None:
    """Make a finished run an unfinished one of this configuration. What it made stays until it is made anew."""
    (path / SUMMARY).unlink()
    (path / SUMS).unlink()
    files.write_json(path / "config.json", files.to_json(config))


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
      ConfigError: if a file of the run is not as it was when it finished, naming it.
    """
    try:
        check_sums(path)
        return read_json(path / SUMMARY)
    except TensorError as error:
        raise ConfigError(str(error)) from error


def differences(written: Any, config: TrainConfig) -> dict[str, str]:
    """The fields in which a configuration differs from that of a run, as its config.json has it, with a line for each.

    A field that there was not when the run began counts as its default.
    """
    found = files.flat(written) if isinstance(written, Mapping) else {}
    wanted = files.flat(files.to_json(config))
    found = {name: default for name in wanted if (default := _default(config, name)) is not None} | found
    return {
        name: f"{name}: the run has {_shown(found, name)}, got {_shown(wanted, name)}"
        for name in sorted({*found, *wanted})
        if name.split(".")[0] not in HOW and found.get(name) != wanted.get(name)
    }


def _default(config: Any, name: str) -> Any:
    """What a field is when nobody gives it, as JSON; None also where there is no default."""
    *parts, last = name.split(".")
    for part in parts:
        config = getattr(config, part, None)
    if not dataclasses.is_dataclass(config):
        return None
    default = next((field.default for field in dataclasses.fields(config) if field.name == last), None)
    return None if default is dataclasses.MISSING else files.to_json(default)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "no such field"
