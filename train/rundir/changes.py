"""The allowed and the actual changes between two starts of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from train.config import TrainConfig
from train.rundir.codec import flat, to_json
from train.rundir.directory import RunDirectory

HOW = ("cache_dir", "compute", "log", "model.attention", "processes", "resume", "run_dir", "save", "sweep.at_once")
"""Fields for the computation, logging and saving of a run. They do not affect the result, except for rounding and
dropout masks."""

ASIDE = tuple(name for name in HOW if name not in ("compute", "model.attention"))
"""Those that do not affect speed and memory either."""

LATER = ("eval_batch_size", "eval_every", "eval_every_steps", "fit.epochs", "fit.patience", "keep", "log_every")
"""Fields that may change when a run resumes. They do not affect the result, except through the learning rate (see
`train.loop.extend`) and the end of training."""

MORE = ("fit.epochs", "fit.patience")
"""Those that extend a finished run."""


def config_changes(written: Mapping[str, Any], config: TrainConfig) -> dict[str, str]:
    """The fields, except `HOW`, in which ``config`` differs from a run's configuration in JSON, with one line each.

    A field that did not exist yet when the run started counts as its default, and so does a base of null, as a
    checkpoint had.
    """
    written = {name: one for name, one in written.items() if not (name == "base" and one is None)}
    found, wanted = flat(written), flat(to_json(config))
    found = {name: default for name in wanted if (default := _default(config, name)) is not None} | found
    return {
        name: f"{name}: the run has {_shown(found, name)}, got {_shown(wanted, name)}"
        for name in sorted({*found, *wanted})
        if not {name, name.split(".")[0]} & {*HOW} and found.get(name) != wanted.get(name)
    }


def data_changes(directory: RunDirectory, data: Mapping[str, Any]) -> list[str]:
    """One line per source that has changed since the run started.

    Runs of earlier versions have no ``data.json``: their data are unknown.
    """
    then = flat(directory.read_data())
    return [
        f"data.{name}: {now['source']} has the sha256 {now['digest'][:12]}, and had {str(was)[:12]} ({directory.data})"
        for name, now in data.items()
        if then and (was := then.get(f"{name}.digest")) != now["digest"]
    ]


def _default(config: Any, name: str) -> Any:
    """A field's default, as JSON; None also if there is no default."""
    *parts, last = name.split(".")
    for part in parts:
        config = getattr(config, part, None)
    if not dataclasses.is_dataclass(config):
        return None
    default = next((field.default for field in dataclasses.fields(config) if field.name == last), None)
    if dataclasses.is_dataclass(default):
        return type(default).__name__
    return None if default is dataclasses.MISSING else to_json(default)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "no such field"
