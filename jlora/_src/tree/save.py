"""`save` and `load`: adapters on disk, as arrays (orbax) with what is recorded beside them.

folder/
  arrays/         the factors a, b and magnitude, or whole leaves, by number
  adapters.json   by path: that number, shapes and dtypes; of factors also scale, axes and dropout
  SHA256SUMS      of all these files, so that no change of a bit goes unseen
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora._src.paths import bullets, check_kinds
from jlora._src.types import Adapters, Array, Axes, LoraFactors
from jlora._src.types import Path as LeafPath
from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.safetensors import TensorError, read_json, write_json

PARTS = ("a", "b", "magnitude")
CONTENT = {"arrays", "adapters.json", SUMS}


def save(folder: str | os.PathLike[str], adapters: Adapters) -> None:
    """Write adapters so that ``folder`` holds all of them or what it held before.

    Args:
      folder: made with its parents; adapters that are there are replaced.
      adapters: as from `jlora.init`, in any sharding. With several processes all of them call this, and see one disk.

    Raises:
      ValueError: if there are no adapters, or arrays without entries, naming each. Nothing is written.
      TensorError: if ``folder`` is a file or holds anything but adapters. Nothing is written.
    """
    import orbax.checkpoint as ocp  # here, because it would take half of the time of `import jlora`

    folder = Path(folder).resolve()
    _check_savable(folder, adapters)
    keys = {path: f"{i:04}" for i, path in enumerate(adapters)}
    draft = folder.with_name(f".{folder.name}-{_one_for_all(uuid.uuid4().hex)}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / "arrays", {keys[path]: _arrays(value) for path, value in adapters.items()})
        if jax.process_index() == 0:
            write_json(draft / "adapters.json", {p: {"key": keys[p], **record_of(v)} for p, v in adapters.items()})
            write_sums(draft)
            _replace(draft, folder)
        _one_for_all("done")
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
      TensorError: if there are none, or a file is missing or not, bit for bit, as it was written; all are named.
      ValueError: if they differ from ``like``, naming every path with what was got and expected.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).resolve()
    if not (folder / "adapters.json").is_file():
        raise TensorError(f"{folder} holds no adapters: adapters.json is missing. Expected a folder of jlora.save.")
    check_sums(folder)
    records = _read_records(folder / "adapters.json")
    expected = {path: _shapes(record) for path, record in records.items()}
    if like is not None:
        if wrong := differences(records, {path: record_of(value) for path, value in like.items()}):
            raise ValueError(
                f"{folder}: the adapters on disk differ from the expected ones:{bullets(wrong)}\nExpected adapters of "
                "the same config and model; load without like= to take them as they are."
            )
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, expected)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, dict(shardings))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            wanted = {records[path]["key"]: _arrays(value) for path, value in target.items()}
            arrays = checkpointer.restore(folder / "arrays", wanted)
    except Exception as error:  # orbax and tensorstore have no common class for what a disk may do
        raise TensorError(
            f"{folder / 'arrays'}: orbax cannot read the arrays of the adapters ({one_line(error)}). Expected those of "
            "adapters.json; save them again."
        ) from error
    return {path: _rebuilt(arrays[record["key"]], record) for path, record in records.items()}


def record_of(value: LoraFactors | Array) -> dict[str, Any]:
    """What JSON keeps of one adapter: shapes, dtypes, and the static fields of factors."""
    if not isinstance(value, LoraFactors):
        return {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
    axes = {role: list(numbers) for role, numbers in value.axes._asdict().items()}
    arrays = {part: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name} for part, x in _arrays(value).items()}
    return {**arrays, "scale": value.scale, "axes": axes, "dropout": value.dropout}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What tells records of adapters, by path, from the expected ones: a line for each difference."""
    wrong = [f"{path!r} is missing" for path in expected if path not in found]
    wrong += [f"{path!r} is not expected" for path in found if path not in expected]
    wrong += [
        f"{path!r}: {name} is {found[path].get(name)}, expected {expected[path].get(name)}"
        for path in expected
        if path in found
        for name in sorted({*expected[path], *found[path]} - {"key"})
        if found[path].get(name) != expected[path].get(name)
    ]
    return wrong


def one_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


def _one_for_all(text: str) -> str:
    """The first process's text, in all of them, once all have come here."""
    if jax.process_count() == 1:
        return text
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode(), np.uint8))
    return bytes(np.asarray(told)).decode()


def _check_savable(folder: Path, adapters: Adapters) -> None:
    if not adapters:
        raise ValueError(
            "save: there are no adapters, got {}; expected those of jlora.init. Choose targets that match a weight."
        )
    check_kinds(adapters, "save")
    empty = [
        f"{path!r} of shape {tuple(leaf.shape)}"
        for path, value in adapters.items()
        for leaf in jax.tree.leaves(value)
        if 0 in leaf.shape
    ]
    if empty:
        raise ValueError(
            f"save: {len(empty)} arrays have no entries:{bullets(empty)}\nExpected at least one in each: leave these "
            "adapters out, or give them a rank above 0."
        )
    if folder.exists() and not folder.is_dir():
        raise TensorError(f"save: {folder} is a file; expected a folder of jlora.save, or one to be made")
    if folder.is_dir() and (foreign := sorted({entry.name for entry in folder.iterdir()} - CONTENT)):
        raise TensorError(
            f"save: {folder} is replaced whole, and holds what is not of jlora.save:{bullets(foreign)}\nExpected "
            f"{' and '.join(sorted(CONTENT))} alone, or nothing: save into a new folder."
        )


def _replace(draft: Path, folder: Path) -> None:
    """``draft`` becomes ``folder``; when that fails, the old one is there again."""
    if not folder.exists():
        os.replace(draft, folder)
        return
    old = draft.with_name(draft.name + "-old")
    os.replace(folder, old)
    try:
        os.replace(draft, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def _read_records(file: Path) -> dict[str, Any]:
    """The records of adapters.json.

    Raises:
      TensorError: naming every one that `save` cannot have written.
    """
    records = read_json(file)
    wrong = [f"{path!r}: {fault}" for path, record in records.items() if (fault := _fault(record))]
    wrong = wrong or (["there is no adapter"] if not records else [])
    if not wrong and len({record["key"] for record in records.values()}) < len(records):
        wrong = ["two adapters have the same key"]
    if wrong:
        raise TensorError(f"{file} is damaged:{bullets(wrong)}\nExpected the file as jlora.save wrote it; save again.")
    return records


def _fault(record: Any) -> str | None:
    """What is wrong with one record of adapters.json."""
    if not isinstance(record, dict):
        return f"got {record!r:.80}, expected an object"
    factors = "a" in record or "b" in record
    arrays = [p for p in PARTS if p != "magnitude" or p in record] if factors else []
    fields = {"key", *arrays, "scale", "axes", "dropout"} if factors else {"key", "shape", "dtype"}
    if set(record) != fields:
        return f"got {sorted(record)}, expected {sorted(fields)}"
    if not isinstance(record["key"], str):
        return f"key is {record['key']!r:.80}, expected a string"
    for entry in [record[part] for part in arrays] or [{name: record[name] for name in ("shape", "dtype")}]:
        if not isinstance(entry, dict) or not _is_sizes(entry.get("shape")) or not _is_dtype(entry.get("dtype")):
            return f"got {entry!r:.80}, expected a shape and a dtype"
    if not factors:
        return None
    for name in ("scale", "dropout"):
        if type(record[name]) not in (int, float):
            return f"{name} is {record[name]!r:.80}, expected a number"
    axes = record["axes"]
    if not isinstance(axes, dict) or set(axes) != set(Axes._fields) or not all(map(_is_sizes, axes.values())):
        return f"axes is {axes!r:.80}, expected numbers for {', '.join(Axes._fields)}"
    return None


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(np.dtype(value))
    except TypeError:
        return False


def _arrays(value: LoraFactors | Array) -> Any:
    if not isinstance(value, LoraFactors):
        return value
    return {part: array for part in PARTS if (array := getattr(value, part)) is not None}


def _shapes(record: Mapping[str, Any]) -> Any:
    def shape(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])

    return _rebuilt({p: shape(record[p]) for p in PARTS if p in record}, record) if "a" in record else shape(record)


def _rebuilt(arrays: Any, record: Mapping[str, Any]) -> LoraFactors | Array:
    if "a" not in record:
        return arrays
    axes = Axes(**{role: tuple(numbers) for role, numbers in record["axes"].items()})
    return LoraFactors(**arrays, scale=record["scale"], axes=axes, dropout=record["dropout"])
