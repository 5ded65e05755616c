"""Files: array trees (orbax), JSON, and what a run directory holds.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration: defaults, overrides, and what was taken from the data
      data.json        what was read: sources, files, rows, sums
      plan.txt         what is adapted, and how
      metrics.jsonl    a line for each epoch of each training, and some on the way
      checkpoints/     from which the training goes on when it was stopped; see `train.loop.checkpoints`
      adapters/        what is kept of what was trained, as `jlora.save` writes it
      merged/          of a network trained from scratch: plain parameters for the unmodified model (orbax)
      curves.png       loss and metrics over the steps
      summary.json     the figures
      SHA256SUMS       of what a finished run is used by: configuration, data, adapters, records, figures
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
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax
import orbax.checkpoint as ocp

from jlora import LoraConfig
from jlora.fields import expected, fits
from jlora.messages import nearest, shown


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
    draft.write_text(text_of(value))
    os.replace(draft, path)


def text_of(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, default=str) + "\n"


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


def from_json(kind: Any, value: Any, path: str = "") -> Any:
    """The configuration of type ``kind`` that `to_json` wrote as ``value``; ``path`` is its place in the whole.

    Raises:
      ValueError: if it is none, naming the field.
    """
    if get_origin(kind) in (Union, UnionType):
        options: list[Any] = [one for one in get_args(kind) if one is not type(None)]
        named: dict[str, Any] = {getattr(one, "__name__", ""): one for one in options if dataclasses.is_dataclass(one)}
        if value is None and len(options) < len(get_args(kind)):
            return None
        if len(options) > 1 and not named:
            return _leaf(kind, value, path)
        chosen = options[0]
        if named:
            chosen = named.get(str(value.get("kind"))) if isinstance(value, Mapping) else None
            if chosen is None:
                raise ValueError(f"{path} = {shown(value)}; expected the kind {' or '.join(named)}")
        return from_json(chosen, value, path)
    if kind is LoraConfig:
        try:
            return LoraConfig.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _part(kind, value, f"{path}." if path else "")
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {name: from_json(get_args(kind)[1], one, f"{path}.{name}") for name, one in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_json(get_args(kind)[0], one, f"{path}[{i}]") for i, one in enumerate(value))
    return Path(_leaf(str, value, path)) if kind is Path else _leaf(kind, value, path)


def _part(kind: type[Any], value: Any, prefix: str) -> Any:
    """The dataclass ``kind`` that a configuration holds below ``prefix``."""
    hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping) or value.get("kind", kind.__name__) != kind.__name__:
        raise ValueError(f"{prefix or 'the file'} = {shown(value)}; expected a {kind.__name__}")
    given = {name: one for name, one in value.items() if name != "kind"}
    wrong = [f"{prefix}{name} is unknown{nearest(name, fields)}" for name in given if name not in fields]
    wrong += [
        f"{prefix}{name} is missing"
        for name, field in fields.items()
        if name not in given and field.default is field.default_factory is dataclasses.MISSING
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return kind(**{name: from_json(hints[name], one, prefix + name) for name, one in given.items()})


def _leaf(kind: Any, value: Any, path: str) -> Any:
    if not fits(value, kind):
        raise ValueError(f"{path} = {shown(value)}; expected {expected(kind)}")
    return value
