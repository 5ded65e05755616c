"""Files: array trees (orbax), JSON, and what a run directory holds.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration: defaults, overrides, and what was taken from the data
      plan.txt         what is adapted, and how
      metrics.jsonl    a line for each epoch of each training, and some on the way
      checkpoints/     from which the training goes on when it was stopped; see `train.checkpoints`
      adapters/        what is kept of what was trained, as `jlora.save` writes it
      merged/          of a network trained from scratch: plain parameters for the unmodified model (orbax)
      curves.png       when matplotlib is installed
      summary.json     the figures
      run.lock         held by the process that trains

The summary is written last: a run directory without one is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import jax
import orbax.checkpoint as ocp

from jlora import LoraConfig


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of this process's arrays to ``path``, instead of what is there; it appears whole or not at all."""
    with _alone() as checkpointer:
        checkpointer.save(path.resolve(), tree, force=True)


def load_tree(path: Path, like: Any, shardings: Any = None) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of ``like`` (arrays or shape structs).

    ``shardings`` is a tree like it, or None for one device of this process.
    """
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, like)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    with _alone() as checkpointer:
        return checkpointer.restore(path.resolve(), target)


def _alone() -> ocp.StandardCheckpointer:
    """orbax for this process, which does not wait for others."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` holds all of it or what it held before."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(draft, path)


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


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration, as `to_json` wrote it, by dotted names; which one a part is, by the part's name.

    ``{"kind": "TrainConfig", "fit": {"kind": "FitConfig", "epochs": 2}}`` is ``{"fit": "FitConfig", "fit.epochs": 2}``.
    """
    found: dict[str, Any] = {}
    for name, one in value.items():
        if isinstance(one, Mapping) and one:
            found |= flat(one, f"{prefix}{name}.")
        elif name != "kind":
            found[prefix + name] = one
        elif prefix:
            found[prefix.removesuffix(".")] = one
    return found


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
