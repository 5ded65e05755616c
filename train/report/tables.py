"""The content of a report: rows of tables, and points of curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from train.report.reading import Points, ReportedRun, is_number
from train.rundir.changes import ASIDE

Rows = list[tuple[str, list[str]]]
"""Rows of a table: a label, and a cell for each run."""

RATES = ("tokens_per_second", "examples_per_second")
"""The report draws the first of these that a run has."""


def metric_tables(runs: Sequence[ReportedRun]) -> dict[str, Rows]:
    """Tables of the runs' metrics by title, without empty rows."""
    primaries = _in_order(run.primary for run in runs)
    tables = {primary: _of_models(runs, primary) for primary in primaries}
    tables["other metrics, adapted"] = _others(runs, primaries)
    tables["training"] = [(label, [cell(run) for run in runs]) for label, cell in TRAINING.items()]
    tables["speed and memory"] = [(label, [cell(run.summary) for run in runs]) for label, cell in SPEED.items()]
    tables = {title: [row for row in rows if any(row[1])] for title, rows in tables.items()}
    return {_words(title): rows for title, rows in tables.items() if rows}


def main_metrics(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """The adapted models' main metrics: columns by title (at most two lines), with a cell for each run."""
    columns = {"run": [run.name for run in runs]}
    for primary in _in_order(run.primary for run in runs):
        for name in _sets(runs, primary):
            columns[f"{name}\n{_words(primary)}"] = [_metric(run, "adapted", name, primary) for run in runs]
    columns["trained\nparameters"] = [_number(run.summary.get("trainable"), "{:,}") for run in runs]
    columns["state"] = [_state(run) for run in runs]
    return columns


def differing_fields(runs: Sequence[ReportedRun]) -> Rows:
    """The fields, except `ASIDE`, in which the configurations differ; a cell is empty if the run lacks the field."""
    names = _in_order(name for run in runs for name in run.config if name.split(".")[0] not in ASIDE)
    parts = _in_order(name.split(".")[0] for name in names)
    names.sort(key=lambda name: parts.index(name.split(".")[0]))
    missing = object()
    values = {name: [run.config.get(name, missing) for run in runs] for name in names}
    return [
        (name, ["" if one is missing else _shown(one) for one in of_runs])
        for name, of_runs in values.items()
        if any(one != of_runs[0] for one in of_runs)
    ]


def plans(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """The names of the runs by plan."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(run.plan, []).append(run.name)
    return {plan: names for plan, names in found.items() if plan}


def curves(runs: Sequence[ReportedRun]) -> dict[str, list[Points]]:
    """The points of every run (possibly none), by panel title."""
    measured = _in_order(f"{name}_{run.primary}" for run in runs for name in _sets([run], run.primary))
    speeds = _in_order(name for run in runs for name in [name for name in RATES if run.averages(name)][:1])
    found = {"training loss": [run.averages("loss") for run in runs]}
    found |= {_words(name): [run.evaluations(name) for run in runs] for name in measured}
    found |= {_words(name): [run.averages(name) for run in runs] for name in ("learning_rate", *speeds)}
    return {title: lines for title, lines in found.items() if any(lines)}


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _sets(runs: Sequence[ReportedRun], metric: str) -> list[str]:
    """The sets of examples with a value of a metric."""
    ending = f"_{metric}"
    ended = [name for run in runs for _, name, of_set in run.final_metrics if of_set == metric]
    way = [name for run in runs if run.primary == metric for record in run.records for name in record]
    return _in_order([*ended, *(name.removesuffix(ending) for name in way if name.endswith(ending))])


def _of_models(runs: Sequence[ReportedRun], metric: str) -> Rows:
    models = _in_order(["base", "adapted", *(model for run in runs for model, _, _ in run.final_metrics)])
    return [
        (f"{name}, {model}", [_metric(run, model, name, metric) for run in runs])
        for name in _sets(runs, metric)
        for model in models
    ]


def _others(runs: Sequence[ReportedRun], primaries: Sequence[str]) -> Rows:
    keys = dict.fromkeys(
        key for run in runs for key in run.final_metrics if key[0] == "adapted" and key[2] not in primaries
    )
    return [
        (f"{name}, {_words(metric)}", [_metric(run, model, name, metric) for run in runs])
        for model, name, metric in keys
    ]


def _metric(run: ReportedRun, model: str, name: str, metric: str) -> str:
    """A model's metric; for the adapted model of an unfinished run, the newest value and its step."""
    if run.summary or model != "adapted":
        return _number(run.final_metrics.get((model, name, metric)), "{:.4f}")
    step, value = (run.evaluations(f"{name}_{metric}") or [(0, None)])[-1]
    return _number(value, f"{{:.4f}} at step {step:,}")


def _number(value: Any, form: str) -> str:
    return form.format(value) if is_number(value) else ""


def _scaled(name: str, scale: float, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that formats a number of a summary in another unit."""
    return lambda summary: _number(summary[name] * scale if is_number(summary.get(name)) else None, form)


def _state(run: ReportedRun) -> str:
    if run.summary:
        return "finished"
    ends = [record for record in run.records if is_number(record.get("epoch")) and record["epoch"] > 0]
    epochs, step = run.config.get("fit.epochs"), run.records[-1]["step"] if run.records else 0
    known = ends and isinstance(epochs, int)
    return f"unfinished, step {step:,} of {ends[-1]['step'] * epochs // ends[-1]['epoch'] if known else '?'}"


def _used(run: ReportedRun, part: str) -> str:
    """The number of examples of a part of the data."""
    data = run.summary.get("data")
    found = data.get(part) if isinstance(data, Mapping) else None
    return _number(found.get("used") if isinstance(found, Mapping) else None, "{:,}")


def _trained(run: ReportedRun) -> str:
    trainable, total = run.summary.get("trainable"), run.summary.get("total")
    if isinstance(trainable, int) and isinstance(total, int) and total:
        return f"{trainable:,} of {total:,} ({trainable / total:.2%})"
    return _number(trainable, "{:,}")


def _duration(run: ReportedRun) -> str:
    """The time of the training, of all its parts if it was resumed; of older runs, that of the last part."""
    seconds = run.summary.get("training_seconds", run.summary.get("seconds"))
    return str(timedelta(seconds=round(seconds))) if is_number(seconds) else ""


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # 8.0 is 8 where the config file has it so
        value = int(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value) or '""'


TRAINING: dict[str, Callable[[ReportedRun], str]] = {
    "state": _state,
    "mode": lambda run: str(run.config.get("mode", "")),
    "seed": lambda run: str(run.config.get("seed", "")),
    "training examples": lambda run: _used(run, "train"),
    "validation examples": lambda run: _used(run, "validation"),
    "kept step": lambda run: _number(run.summary.get("kept_step"), "{:,}"),
    "ended": lambda run: str(run.summary.get("ended") or ""),
    "trained parameters": _trained,
    "training time, h:mm:ss": _duration,
}
SPEED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "layout": lambda summary: str(summary.get("layout") or ""),
    "time per step": _scaled("step_seconds", 1e3, "{:,.1f} ms"),
    "examples per second": _scaled("examples_per_second", 1, "{:,.0f}"),
    "tokens per second": _scaled("tokens_per_second", 1, "{:,.0f}"),
    "tokens with loss per second": _scaled("loss_tokens_per_second", 1, "{:,.0f}"),
    "padding": _scaled("padding", 1, "{:.1%}"),
    "time waiting for input": _scaled("input", 1, "{:.1%}"),
    "share of the devices' peak": _scaled("mfu", 1, "{:.1%}"),
    "peak memory": _scaled("peak_memory_bytes", 2**-30, "{:.2f} GiB"),
}
