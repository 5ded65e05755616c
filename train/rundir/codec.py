"""Configurations as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jlora import LoraConfig
from jlora.fields import expected, fits
from jlora.files.buckets import text
from jlora.messages import nearest, shown


def to_json(value: Any) -> Any:
    """A configuration as JSON values; a dataclass becomes an object with its class name under ``kind``."""
    if isinstance(value, LoraConfig):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    return text(value) if isinstance(value, Path) else value


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration in JSON, by dotted names; a part's own name holds its ``kind``.

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
    """The configuration of type ``kind`` from the ``value`` of `to_json`; ``path`` is its field.

    Raises:
      ValueError: listing each field that is unknown, missing or of another type.
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
    """The dataclass ``kind`` from the fields below ``prefix``."""
    hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping) or value.get("kind", kind.__name__) != kind.__name__:
        raise ValueError(f"{prefix or 'the file'} = {shown(value)}; expected a {kind.__name__}")
    # Earlier versions wrote null for a part that now has a default.
    given = {
        name: one
        for name, one in value.items()
        if name != "kind" and not (one is None and name in fields and dataclasses.is_dataclass(fields[name].default))
    }
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
