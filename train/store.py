"""Files: array trees (orbax), JSON, and the run directory.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration: defaults, overrides, and what was taken from the data
      metrics.jsonl    a line for each epoch of each training, and some on the way
      adapters/        what is kept of what was trained, as `jlora.save` writes it after every measurement
      merged/          of a network trained from scratch: plain parameters for the unmodified model (orbax)
      curves.png       when matplotlib is installed
      summary.json     the figures

The summary is written last: a run directory without one is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import jax
import orbax.checkpoint as ocp

from jlora import LoraConfig
from train.config import TrainConfig


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of arrays to a new directory ``path``; it appears whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)


def load_tree(path: Path, like: Any) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of ``like`` (arrays or shape structs)."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.resolve(), target)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` holds all of it or what it held before."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(draft, path)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append ``record`` as a line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def make_run_dir(config: TrainConfig) -> Path:
    """The directory of this run, made anew, with ``config.json`` in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = config.run_dir or Path("runs") / f"{config.name}-{config.mode}-seed{config.seed}-{stamp}"
    run_dir.mkdir(parents=True, exist_ok=config.run_dir is not None)
    write_json(run_dir / "config.json", to_json(config))
    return run_dir


def to_json(value: Any) -> Any:
    """A configuration as JSON can hold it; a dataclass says which one it is under ``kind``."""
    if isinstance(value, LoraConfig):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: Any, value: Any) -> Any:
    """The configuration of type ``kind`` that `to_json` wrote as ``value``.

    Raises:
      KeyError, TypeError, ValueError: if it is none.
    """
    if isinstance(kind, UnionType):
        if value is None:
            return None
        options: list[Any] = [one for one in get_args(kind) if one is not type(None)]
        named: dict[str, Any] = {getattr(one, "__name__", ""): one for one in options if dataclasses.is_dataclass(one)}
        return from_json(named[value["kind"]] if named else options[0], value)
    if kind is LoraConfig:
        return LoraConfig.from_json(json.dumps(value))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], one) for name, one in value.items() if name != "kind"})
    if get_origin(kind) is dict:
        return {name: from_json(get_args(kind)[1], one) for name, one in value.items()}
    if get_origin(kind) is tuple:
        return tuple(from_json(get_args(kind)[0], one) for one in value)
    return Path(value) if kind is Path else value
