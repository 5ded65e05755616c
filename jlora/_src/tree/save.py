"""`save` and `load`: adapters on disk, as orbax arrays and a JSON file.

folder/
  arrays/         the factors a, b and magnitude, or whole leaves, by number
  adapters.json   by path: that number, shapes and dtypes; for factors also scale, axes and dropout
  SHA256SUMS      of all these files, to detect a flipped bit
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora._src.tree.checks import check_kinds, check_mapping
from jlora._src.types import Adapters, Array, LoraFactors
from jlora._src.types import Path as LeafPath
from jlora.files.adapters import arrays_of, differences, fault, record_of, shapes_of, with_arrays
from jlora.files.buckets import absolute, is_in_bucket, located, remove_folder
from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.errors import TensorError
from jlora.files.json_files import read_json, write_json
from jlora.messages import bullets, one_line

_CONTENT = {"arrays", "adapters.json", SUMS}


def save(folder: str | os.PathLike[str], adapters: Adapters) -> None:
    """Write adapters to ``folder``, atomically: if writing fails, the folder keeps its old content.

    In a bucket, which has no rename, the old content is removed first, and a folder that was not written to its end is
    an error for `load`.

    Args:
      folder: a path, or a URL as ``gs://bucket/folder``; created with its parents; replaces adapters in it.
      adapters: as from `init`, with any sharding. With several processes, all must call this, on a shared disk.

    Raises:
      ValueError: if there are no adapters, or if arrays are empty, listing each. Nothing is written.
      TypeError: if a value is neither factors nor an array, such as an NNX variable. Nothing is written.
      TensorError: if ``folder`` is a file, or contains anything but adapters. Nothing is written.
    """
    import orbax.checkpoint as ocp  # imported here: it would double the time of `import jlora`

    folder = absolute(located(folder))
    _check_savable(folder, adapters)
    keys = {path: f"{i:04}" for i, path in enumerate(adapters)}
    with _draft(folder) as draft:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / "arrays", {keys[path]: arrays_of(value) for path, value in adapters.items()})
        if jax.process_index() == 0:
            write_json(draft / "adapters.json", {p: {"key": keys[p], **record_of(v)} for p, v in adapters.items()})
            write_sums(draft)


def load(
    folder: str | os.PathLike[str], *, like: Adapters | None = None, shardings: Any = None
) -> dict[LeafPath, LoraFactors | Array]:
    """Load adapters saved by `save`, bit for bit.

    Args:
      folder: as given to `save`.
      like: the expected adapters, or their shapes; the ones on disk must match in paths, shapes, dtypes, scale,
        axes and dropout.
      shardings: one sharding, or a tree like the adapters; by default JAX's default device.

    Raises:
      TensorError: if there are none, or files are missing or damaged, listing all.
      ValueError: if they differ from ``like``, listing every difference.
      TypeError: if a value of ``like`` is neither factors nor an array.
    """
    import orbax.checkpoint as ocp

    folder = absolute(located(folder))
    if like is not None:
        check_kinds(like, "load, like")
    if not (folder / "adapters.json").is_file():
        raise TensorError(f"{folder} holds no adapters: adapters.json is missing. Expected a folder of jlora.save.")
    check_sums(folder)
    records = _read_records(folder / "adapters.json")
    expected = {path: shapes_of(record) for path, record in records.items()}
    wanted = None if like is None else {path: record_of(value) for path, value in like.items()}
    if wanted is not None and (wrong := differences(records, wanted)):
        raise ValueError(
            f"{folder}: the adapters on disk differ from the expected ones:{bullets(wrong)}\nExpected adapters of the "
            "same config and model; leave out like= to load them as they are."
        )
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, expected)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected, dict(shardings))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            targets = {records[path]["key"]: arrays_of(value) for path, value in target.items()}
            arrays = checkpointer.restore(folder / "arrays", targets)
    except Exception as error:  # orbax and tensorstore have no common class for I/O errors
        raise TensorError(
            f"{folder / 'arrays'}: orbax cannot read the arrays of the adapters ({one_line(error)}). Expected those "
            "that adapters.json lists; save them again."
        ) from error
    return {path: with_arrays(arrays[record["key"]], record) for path, record in records.items()}


@contextlib.contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """The folder to write to, which replaces ``folder`` at the end; in a bucket, ``folder`` itself, emptied."""
    is_first = jax.process_index() == 0
    token = _from_first_process(uuid.uuid4().hex)  # from here on, no process looks at the old content
    if is_in_bucket(folder):
        if is_first:
            remove_folder(folder, first=SUMS)
        _from_first_process("empty")
        yield folder
        _from_first_process("done")
        return
    draft = folder.with_name(f".{folder.name}-{token}")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        if is_first:
            _replace(draft, folder)
        _from_first_process("done")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _from_first_process(text: str) -> str:
    """Broadcasts the first process's text to all processes, and waits for all."""
    if jax.process_count() == 1:
        return text
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode(), np.uint8))
    return bytes(np.asarray(sent)).decode()


def _check_savable(folder: Path, adapters: Adapters) -> None:
    check_mapping(adapters, "save")
    if not adapters:
        raise ValueError("save: got no adapters, {}; expected those of jlora.init. Choose targets that match a weight.")
    check_kinds(adapters, "save")
    empty = [
        f"{path!r} of shape {tuple(leaf.shape)}"
        for path, value in adapters.items()
        for leaf in jax.tree.leaves(value)
        if 0 in leaf.shape
    ]
    if empty:
        raise ValueError(
            f"save: {len(empty)} arrays are empty:{bullets(empty)}\nExpected at least one entry in each: leave these "
            "adapters out, or give them a rank above 0."
        )
    if folder.exists() and not folder.is_dir():
        raise TensorError(f"save: {folder} is a file; expected a folder written by jlora.save, or a new one")
    if folder.is_dir() and (foreign := sorted({entry.name for entry in folder.iterdir()} - _CONTENT)):
        raise TensorError(
            f"save: {folder} would be replaced as a whole, but holds other files:{bullets(foreign)}\nExpected only "
            f"{', '.join(sorted(_CONTENT))}, or nothing: save to a new folder."
        )


def _replace(draft: Path, folder: Path) -> None:
    """Renames ``draft`` to ``folder``; if that fails, restores the old folder."""
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
      TensorError: listing every record that `save` cannot have written.
    """
    records = read_json(file)
    wrong = [f"{path!r}: {problem}" for path, record in records.items() if (problem := fault(record))]
    wrong = wrong or (["there are no adapters"] if not records else [])
    if not wrong and len({record["key"] for record in records.values()}) < len(records):
        wrong = ["two adapters have the same key"]
    if wrong:
        raise TensorError(f"{file} is damaged:{bullets(wrong)}\nExpected an unchanged file of jlora.save; save again.")
    return records
