"""Registers adapters, attached and quantized leaves with `jax.export` and `flax.serialization`, with static fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import serialization
from jax import export

from jlora._src.quantized import QuantizedArray
from jlora._src.types import Axes, FullWeight, LoraFactors, LoraWeight


def _fields(kind: Any, static: bool) -> list[str]:
    """The names of a dataclass's static fields, or of its other fields, in order."""
    return [f.name for f in dataclasses.fields(kind) if bool(f.metadata.get("static")) == static]


def _register_export(kind: Any) -> None:
    """Lets exported functions take and return ``kind``; its static fields are serialized as JSON."""
    names = _fields(kind, static=True)

    def to_bytes(values: Any) -> bytes:
        return json.dumps(dict(zip(names, values, strict=True)), default=_plain).encode()

    def from_bytes(data: Any) -> tuple[Any, ...]:
        values = json.loads(bytes(data))
        if "axes" in values:
            values["axes"] = Axes(*map(tuple, values["axes"]))
        if "dtype" in values:
            values["dtype"] = np.dtype(values["dtype"])
        return tuple(values[name] for name in names)

    def build(aux_data: Any, children: Sequence[Any]) -> Any:
        arrays = dict(zip(_fields(kind, static=False), children, strict=True))
        return kind(**arrays, **dict(zip(names, aux_data, strict=True)))

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jlora.{kind.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
        from_children=build,
    )


def _plain(value: Any) -> Any:
    """A static field that JSON lacks: the name of a dtype, or the number of a NumPy scalar."""
    return value.name if isinstance(value, np.dtype) else value.item()


def _to_state_dict(value: Any) -> dict[str, Any]:
    return {f.name: serialization.to_state_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _from_state_dict(target: Any, state: Any) -> Any:
    """``target`` with the arrays of ``state``, which must have the same static fields and shapes.

    Raises:
      ValueError: listing every field that differs.
    """
    expected = _to_state_dict(target)
    if not isinstance(state, dict) or set(state) != set(expected):
        got = sorted(state) if isinstance(state, dict) else f"a {type(state).__name__}"
        wrong = [f"got {got}, expected the fields {sorted(expected)}"]
    else:
        wrong = [
            f"{name} is {got}, expected {want}"
            for name in expected
            if (got := _comparable(state[name])) != (want := _comparable(expected[name]))
        ]
    if wrong:
        raise ValueError(
            f"flax.serialization: the stored {type(target).__name__} at {serialization.current_path()!r} differs from "
            f"the target: {'; '.join(wrong)}. Expected a target of the same config: adapters from jlora.init, "
            "or their attached tree."
        )
    arrays = {
        name: serialization.from_state_dict(getattr(target, name), state[name], name=name)
        for name in _fields(target, static=False)
    }
    return dataclasses.replace(target, **arrays)


def _comparable(value: Any) -> Any:
    """The part that must be equal: the shape of an array, the value of a static field; nothing for a nested state."""
    if hasattr(value, "shape"):
        return f"an array of shape {np.shape(value)}" if value.shape else "a scalar"
    return "a tree" if isinstance(value, dict) and not set(value) == set(Axes._fields) else value


for _kind in (LoraFactors, LoraWeight, FullWeight, QuantizedArray):
    _register_export(_kind)
    serialization.register_serialization_state(_kind, _to_state_dict, _from_state_dict)
