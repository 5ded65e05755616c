"""From run directories to what their files tell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jlora.files.checksums import SUMS, check_sums
from jlora.messages import bullets
from jlora.models import TensorError
from train.config import ConfigError, TrainConfig
from train.rundir import files
from train.tasks.classify import Classification, Regression
from train.tasks.language import LanguageModel

PRIMARY = {
    "SequenceClassification": Classification.primary,
    "ImageClassification": Classification.primary,
    "CausalLM": LanguageModel.primary,
}

Points = list[tuple[int, float]]
"""Steps, and what was measured there."""


@dataclass(frozen=True)
class ReportedRun:
    """What the files of a run tell.

    Attributes:
      name: of the folder, below as many of its parents as tell it from the other runs.
      config: by dotted names.
      primary: the metric that counts.
      records: of the training; those of its base are left out.
      summary: empty while the run is unfinished.
      plan: what is adapted; empty in runs of older versions.
    """

    name: str
    config: Mapping[str, Any]
    primary: str
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    plan: str

    @property
    def figures(self) -> dict[tuple[str, str, str], Any]:
        """What was measured in the end, by model, set of examples and metric."""
        models = (self.summary.get("metrics") or {}).items()
        sets = [(model, name, metrics) for model, of_sets in models for name, metrics in (of_sets or {}).items()]
        return {(*key, metric): value for *key, metrics in sets for metric, value in (metrics or {}).items()}

    def averages(self, name: str) -> Points:
        """A metric of the training over its steps: between the epochs' ends where there is more to be had, or there."""
        ends = [record for record in self.records if "epoch" in record]
        lines = [record for record in self.records if "epoch" not in record]
        return max(_points(lines, name), _points(ends, name), key=len)

    def measurements(self, name: str) -> Points:
        """A figure of validation examples over the steps at which it was measured."""
        return _points(self.records, name)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Infinite values are NaN, so that they leave a gap."""
    values = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return [(step, float(value) if math.isfinite(value) else math.nan) for step, value in values]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether something in a JSON file is a number; NaN is one too."""
    return isinstance(value, int | float)


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """The runs in these folders; a folder that is given twice counts once.

    Raises:
      ConfigError: listing the folders that are no runs, and the files and lines that cannot be read.
    """
    problems: list[str] = []
    folders = list({folder.resolve(): folder for folder in folders}.values())
    found = [_read(folder, name, problems) for folder, name in zip(folders, _names(folders), strict=True)]
    if problems:
        raise ConfigError(f"report: {len(problems)} problem(s) in the runs:{bullets(problems)}")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]

    def name(mine: tuple[str, ...]) -> str:
        others = [other for other in parts if other != mine]
        unique = (n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others))
        return "/".join(mine[-next(unique, len(mine)) :])

    return [name(mine) for mine in parts]


def _read(folder: Path, name: str, problems: list[str]) -> ReportedRun:
    config = _read_json(folder / "config.json", problems)
    if config is None:
        problems.append(f"{folder} is no run directory: it has no config.json; python -m train makes one below runs/")
    elif config and config.get("kind") != TrainConfig.__name__:
        problems.append(f"{folder} is no run directory: its config.json is of something else, such as a checkpoint")
    config, summary = files.flat(config or {}), _read_json(folder / "summary.json", problems) or {}
    if summary and (folder / SUMS).is_file():  # runs of older versions have none
        try:
            check_sums(folder)
        except TensorError as error:
            problems.append(str(error))
    plan = folder / "plan.txt"
    return ReportedRun(
        name=name,
        config=config,
        primary=summary.get("primary") or _primary(config),
        records=_read_records(folder / "metrics.jsonl", problems),
        summary=summary,
        plan=plan.read_text(encoding="utf-8", errors="replace").rstrip() if plan.is_file() else "",
    )


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a file; None without the file, and empty with a problem."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        problems.append(f"{path} cannot be read: {error}; train the run again, or leave it out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path}, line 1: got a {type(value).__name__}, expected a JSON object; leave the run out")
        return {}
    return value


def _read_records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    # What follows the last line's end is nothing, or what a killed run left of a line.
    *lines, torn = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = [_record(line) for line in lines]
    for number, (line, record) in enumerate(zip(lines, records, strict=True), 1):
        if record is None:
            got = line[:40].decode(errors="replace")
            problems.append(
                f'{path}, line {number}: got {got!r}, expected a JSON object with "phase" and "step"; delete the line'
            )
    return [record for record in (*records, _record(torn)) if record is not None and record["phase"] == "fit"]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and "phase" in record and isinstance(record.get("step"), int)
    return record if sound else None


def _primary(config: Mapping[str, Any]) -> str:
    """The metric that counts in a configuration's task, for runs that have not said so yet."""
    return Regression.primary if config.get("task.regression") else PRIMARY.get(str(config.get("task")), "loss")
