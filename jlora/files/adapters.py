"""Records of adapters: the JSON that a checkpoint stores next to their arrays.

Arrays alone do not determine an update. A record adds shapes and dtypes, and for factors also scale, axes and dropout
rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._src.types import Array, Axes, LoraFactors

_PARTS = ("a", "b", "magnitude")


def record_of(value: LoraFactors | Array) -> dict[str, Any]:
    """The record of one adapter (or of its shapes), as JSON values."""
    if not isinstance(value, LoraFactors):
        return {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
    axes = {role: list(numbers) for role, numbers in value.axes._asdict().items()}
    arrays = {p: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for p, x in arrays_of(value).items()}
    return {**arrays, "scale": value.scale, "axes": axes, "dropout": value.dropout}


def arrays_of(value: LoraFactors | Array) -> Any:
    """The arrays of one adapter: ``{"a": ..., "b": ...}`` and perhaps ``magnitude``, or the whole leaf itself."""
    if not isinstance(value, LoraFactors):
        return value
    return {part: array for part in _PARTS if (array := getattr(value, part)) is not None}


def with_arrays(arrays: Any, record: Mapping[str, Any]) -> LoraFactors | Array:
    """The adapter with these arrays: the inverse of `arrays_of` and `record_of`."""
    if "a" not in record:
        return arrays
    axes = Axes(**{role: tuple(numbers) for role, numbers in record["axes"].items()})
    return LoraFactors(**arrays, scale=record["scale"], axes=axes, dropout=record["dropout"])


def shapes_of(record: Mapping[str, Any]) -> Any:
    """The adapter of a record, with `jax.ShapeDtypeStruct` as its arrays."""

    def shape(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])

    if "a" not in record:
        return shape(record)
    return with_arrays({part: shape(record[part]) for part in _PARTS if part in record}, record)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line per difference between records by path: missing and unexpected paths, and fields that differ."""
    wrong = [f"{path!r} is missing" for path in expected if path not in found]
    wrong += [f"{path!r} is not expected" for path in found if path not in expected]
    wrong += [
        f"{path!r}: {name} is {_shown(found[path].get(name))}, expected {_shown(expected[path].get(name))}"
        for path in expected
        if path in found
        for name in sorted({*expected[path], *found[path]} - {"key"})
        if found[path].get(name) != expected[path].get(name)
    ]
    return wrong


def _shown(field: Any) -> str:
    """A field of a record in an error: an array as ``float32[4, 2]``."""
    return "{dtype}{shape}".format_map(field) if isinstance(field, Mapping) and "dtype" in field else str(field)


def fault(record: Any) -> str | None:
    """Why ``record`` is no valid record with a ``key`` for its arrays; None if it is."""
    if not isinstance(record, dict):
        return f"got {record!r:.80}, expected an object"
    factors = "a" in record or "b" in record
    arrays = [p for p in _PARTS if p != "magnitude" or p in record] if factors else []
    fields = {"key", *arrays, "scale", "axes", "dropout"} if factors else {"key", "shape", "dtype"}
    if set(record) != fields:
        return f"got {sorted(record)}, expected {sorted(fields)}"
    if not isinstance(record["key"], str):
        return f"key is {record['key']!r:.80}, expected a string"
    for entry in [record[part] for part in arrays] or [{name: record[name] for name in ("shape", "dtype")}]:
        if not isinstance(entry, dict) or not _are_sizes(entry.get("shape")) or not _is_dtype(entry.get("dtype")):
            return f"got {entry!r:.80}, expected a shape and a dtype"
    return _fault_of_settings(record) if factors else None


def _fault_of_settings(record: Mapping[str, Any]) -> str | None:
    for name in ("scale", "dropout"):
        if type(record[name]) not in (int, float):
            return f"{name} is {record[name]!r:.80}, expected a number"
    axes = record["axes"]
    if not isinstance(axes, dict) or set(axes) != set(Axes._fields) or not all(map(_are_sizes, axes.values())):
        return f"axes is {axes!r:.80}, expected numbers for {', '.join(Axes._fields)}"
    return None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(np.dtype(value))
    except TypeError:
        return False
