"""`save` and `load`: adapters on disk, as arrays (orbax) with what is recorded beside them.

folder/
  arrays/         the factors a, b and magnitude, or whole leaves, by path
  adapters.json   shapes and dtypes; of factors also scale, axes and dropout
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora._paths import bullets
from jlora._tensors import TensorError, read_json, write_json
from jlora._types import Adapters, Array, Axes, LoraFactors
from jlora._types import Path as LeafPath

PARTS = ("a", "b", "magnitude")


def save(folder: str | os.PathLike[str], adapters: Adapters) -> None:
    """Write adapters so that ``folder`` holds all of them or what it held before.

    Args:
      folder: made with its parents; adapters that are there are replaced.
      adapters: as from `jlora.init`, in any sharding.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / "arrays", {path: _arrays(value) for path, value in adapters.items()})
        write_json(draft / "adapters.json", {path: _record(value) for path, value in adapters.items()})
        if folder.exists():
            old = draft.with_name(draft.name + "-old")
            os.replace(folder, old)
            os.replace(draft, folder)
            shutil.rmtree(old)
        else:
            os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(
    folder: str | os.PathLike[str], *, like: Adapters | None = None, shardings: Any = None
) -> dict[LeafPath, LoraFactors | Array]:
    """Read adapters that `save` wrote, bit for bit.

    Args:
      folder: as given to `save`.
      like: adapters (or their shapes) that are expected; what is on disk is compared with them.
      shardings: where the arrays go: one sharding, or a tree like the adapters; by default JAX's default device.

    Raises:
      TensorError: if there are none, or they are not whole.
      ValueError: if they differ from ``like``, naming every path with what was got and expected.
    """
    folder = Path(folder).absolute()
    if not (folder / "adapters.json").is_file():
        raise TensorError(f"{folder} holds no adapters: adapters.json is missing. Expected a folder of jlora.save.")
    records = read_json(folder / "adapters.json")
    expected = {path: _shapes(record) for path, record in records.items()}
    if like is not None:
        _compare(records, {path: _record(value) for path, value in like.items()}, str(folder))
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, expected)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, dict(shardings))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(folder / "arrays", {p: _arrays(value) for p, value in target.items()})
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise TensorError(f"{folder}: the adapters are not whole ({reason}). Save them again.") from error
    return {path: _rebuilt(arrays[path], record) for path, record in records.items()}


def _arrays(value: LoraFactors | Array) -> Any:
    if not isinstance(value, LoraFactors):
        return value
    return {part: array for part in PARTS if (array := getattr(value, part)) is not None}


def _record(value: LoraFactors | Array) -> dict[str, Any]:
    """What JSON keeps of one adapter."""
    if not isinstance(value, LoraFactors):
        return {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
    axes = {role: list(numbers) for role, numbers in value.axes._asdict().items()}
    arrays = {part: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for part, x in _arrays(value).items()}
    return {**arrays, "scale": value.scale, "axes": axes, "dropout": value.dropout}


def _shapes(record: Mapping[str, Any]) -> Any:
    def shape(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])

    return _rebuilt({p: shape(record[p]) for p in PARTS if p in record}, record) if "a" in record else shape(record)


def _rebuilt(arrays: Any, record: Mapping[str, Any]) -> LoraFactors | Array:
    if "a" not in record:
        return arrays
    axes = Axes(**{role: tuple(numbers) for role, numbers in record["axes"].items()})
    return LoraFactors(**arrays, scale=record["scale"], axes=axes, dropout=record["dropout"])


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    wrong = [f"{path!r} is missing" for path in expected if path not in found]
    wrong += [f"{path!r} is not expected" for path in found if path not in expected]
    wrong += [
        f"{path!r}: {name} is {found[path].get(name)}, expected {expected[path].get(name)}"
        for path in expected
        if path in found
        for name in sorted({*expected[path], *found[path]})
        if found[path].get(name) != expected[path].get(name)
    ]
    if wrong:
        raise ValueError(
            f"{where}: the adapters on disk differ from the expected ones:{bullets(wrong)}\nExpected adapters of the "
            "same config and model; load without like= to take them as they are."
        )
