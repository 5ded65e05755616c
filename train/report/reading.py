"""Run directories, read for a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jlora.files.buckets import absolute, errors_of, located
from jlora.messages import bullets
from train.config import ConfigError
from train.rundir.codec import flat
from train.rundir.directory import RunDirectory
from train.rundir.records import read_records
from train.tasks.classify import Classification, Regression
from train.tasks.language import LanguageModel

PRIMARY = {
    "SequenceClassification": Classification.primary,
    "ImageClassification": Classification.primary,
    "CausalLM": LanguageModel.primary,
}

Points = list[tuple[int, float]]
"""Steps, and the value at each."""


@dataclass(frozen=True)
class ReportedRun:
    """A run, read from its files.

    Attributes:
      name: the folder's, with enough of its parents to be unique among the runs.
      config: its fields by dotted names.
      primary: the main metric.
      records: the training's, without its base's.
      summary: empty while the run is unfinished.
      plan: the adapted weights; empty in runs of earlier versions.
    """

    name: str
    config: Mapping[str, Any]
    primary: str
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    plan: str

    @property
    def final_metrics(self) -> dict[tuple[str, str, str], Any]:
        """The metrics of the final evaluation, by model, set of examples and name."""
        models = (self.summary.get("metrics") or {}).items()
        sets = [(model, name, metrics) for model, of_sets in models for name, metrics in (of_sets or {}).items()]
        return {(*key, metric): value for *key, metrics in sets for metric, value in (metrics or {}).items()}

    def averages(self, name: str) -> Points:
        """A training metric over the steps: at the ends of epochs, or in between if there are more records there."""
        ends = [record for record in self.records if "epoch" in record]
        lines = [record for record in self.records if "epoch" not in record]
        return max(_points(lines, name), _points(ends, name), key=len)

    def evaluations(self, name: str) -> Points:
        """A metric of validation examples, over the steps of its evaluations."""
        return _points(self.records, name)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Infinite values become NaN, a gap in the curve."""
    values = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
    return [(step, float(value) if math.isfinite(value) else math.nan) for step, value in values]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number; NaN is one."""
    return isinstance(value, int | float)


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Read the runs in these folders, each once.

    Raises:
      ConfigError: listing all folders that are not runs, and all unreadable files and lines.
    """
    problems: list[str] = []
    folders = list({absolute(folder): folder for folder in map(located, folders)}.values())
    found = []
    for folder, name in zip(folders, _names(folders), strict=True):
        with errors_of(folder):
            found.append(_read(folder, name, problems))
    if problems:
        raise ConfigError(f"report: {len(problems)} problem(s) in the runs:{bullets(problems)}")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [absolute(folder).parts for folder in folders]

    def name(mine: tuple[str, ...]) -> str:
        others = [other for other in parts if other != mine]
        unique = (n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others))
        return "/".join(mine[-next(unique, len(mine)) :])

    return [name(mine) for mine in parts]


def _read(folder: Path, name: str, problems: list[str]) -> ReportedRun:
    directory = RunDirectory(folder)

    def read_summary() -> dict[str, Any]:
        if directory.is_finished and directory.sums.is_file():  # runs of earlier versions have none
            directory.check_sums()
        return directory.read_summary() if directory.is_finished else {}

    def read(file: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return file()
        except ConfigError as error:
            problems.append(str(error))
            return {}

    config, summary = flat(read(directory.read_single_json)), read(read_summary)
    records, faulty = read_records(directory.metrics)
    problems += [
        f"{directory.metrics}, line {number}: got {line[:40].decode(errors='replace')!r}, expected a JSON object with "
        '"phase" and "step"; delete the line'
        for number, line in faulty.items()
    ]
    return ReportedRun(
        name=name,
        config=config,
        primary=summary.get("primary") or _primary(config),
        records=[record for record in records if record["phase"] == "fit"],
        summary=summary,
        plan=directory.read_plan(),
    )


def _primary(config: Mapping[str, Any]) -> str:
    """The main metric of a configuration's task, for runs whose summary lacks it."""
    return Regression.primary if config.get("task.regression") else PRIMARY.get(str(config.get("task")), "loss")
