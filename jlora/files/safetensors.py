"""Safetensors files: read lazily and with every problem named, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora._src.paths import bullets

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CHUNK = 2**18
MAX_INDEX_BYTES = 100_000_000
"""The largest index or config that is read; as much as safetensors allows a header to have."""


class TensorError(ValueError):
    """A file of tensors that cannot be used; the message names file and tensor, and says what to do."""


class Tensor(NamedTuple):
    """One tensor of a file; `read` fetches it, or a part of it, and nothing else of the file.

    Attributes:
      file: that holds it.
      name: in that file.
      shape, dtype: as stored.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The array, or ``array[index]``.

        The file is mapped anew each time, so that its pages do not count as this process's memory afterwards.

        Raises:
          TensorError: if it holds NaN or infinity.
        """
        with safe_open(self.file, "np") as file:
            # A slice of a scalar is an error in safetensors.
            array = file.get_tensor(self.name) if not index else file.get_slice(self.name)[index]
        if not is_finite(array):
            raise TensorError(
                f"{self.file}: the tensor {self.name!r} holds NaN or infinity. Expected finite weights; the file is "
                "damaged, or the training that wrote it diverged."
            )
        return array


def is_finite(array: np.ndarray) -> bool:
    """Whether a floating array is free of NaN and infinity; arrays of other types are."""
    if array.dtype.kind in "biu" or not array.size:
        return True
    if array.dtype.itemsize == 2:
        # Numpy compares these types one by one; as integers without the sign it is a hundred times faster.
        infinity = int(np.array(np.inf, array.dtype).view(np.uint16))
        bits = array.view(np.uint16).ravel()
        return all(int((bits[i : i + _CHUNK] & 0x7FFF).max()) < infinity for i in range(0, bits.size, _CHUNK))
    # The maximum and the minimum are NaN or infinite when an entry is, and need no array of booleans.
    return bool(np.isfinite(np.max(array)) and np.isfinite(np.min(array)))


def open_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, from its header alone.

    Raises:
      TensorError: if it is no such file, is truncated or has a header that cannot be; nothing else of it is read.
    """
    try:
        with safe_open(file, "np") as opened:
            found = {name: (part := opened.get_slice(name)).get_shape() + [part.get_dtype()] for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise TensorError(
            f"{file} is no whole safetensors file ({error}). Expected a file as safetensors writes it; fetch or export "
            "it again."
        ) from error
    if odd := {name: entry[-1] for name, entry in found.items() if entry[-1] not in _DTYPES}:
        raise TensorError(
            f"{file}: no dtype of JAX for these tensors:{bullets(f'{n}: {d}' for n, d in odd.items())}\nExpected one "
            f"of {', '.join(_DTYPES)}; quantized checkpoints are not read, load the one that they were made from."
        )
    return {name: Tensor(file, name, tuple(shape), np.dtype(_DTYPES[dtype])) for name, (*shape, dtype) in found.items()}


def open_checkpoint(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a folder: of ``{stem}.safetensors``, or of the files that ``{stem}.safetensors.index.json`` lists.

    Raises:
      TensorError: if there is neither, or the index names files elsewhere, that are missing or that lack a tensor.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return open_tensors(single)
    if not index.is_file():
        pickles = sorted(f.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(ending))
        raise TensorError(
            f"{folder} has neither {single.name} nor {index.name}"
            + (
                f"; it has {', '.join(pickles)}, which is pickled: reading it could run any code, so it is not read. "
                "Convert it where you trust it: `model = AutoModel.from_pretrained(folder)`, then "
                "`model.save_pretrained(new_folder)`, which writes safetensors."
                if pickles
                else f". Expected one of them; the folder has {sorted(f.name for f in folder.glob('*'))}."
            )
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise TensorError(f"{index}: expected a `weight_map` from tensor names to file names, got {weight_map!r:.200}")
    wanted = sorted(set(weight_map.values()))
    if outside := [name for name in wanted if Path(name).name != name or "\\" in name or name in ("", "..")]:
        raise TensorError(
            f"{index} names files outside of its folder: {outside}. Expected plain file names; do not use "
            "this checkpoint."
        )
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise TensorError(f"{index} names files that are not there: {missing}. Fetch the checkpoint again.")
    files = {name: open_tensors(folder / name) for name in wanted}
    lacking = [f"{tensor!r} is not in {file}" for tensor, file in weight_map.items() if tensor not in files[file]]
    if lacking:
        raise TensorError(f"{index} and the files do not agree:{bullets(lacking)}\nFetch the checkpoint again.")
    return {tensor: files[file][tensor] for tensor, file in weight_map.items()}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      TensorError: if there is none, it is absurdly large, holds no JSON object, or one that has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise TensorError(f"{file} has these keys twice: {twice}; expected each once, as readers take either")
        return found

    try:
        if (size := file.stat().st_size) > MAX_INDEX_BYTES:
            raise TensorError(f"{file} has {size:,} bytes; expected at most {MAX_INDEX_BYTES:,}")
        value = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except TensorError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError also of a number of thousands of digits
        raise TensorError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TensorError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(file: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write ``value`` as JSON; ``file`` holds all of it or what it held before."""
    with _drafts([file]) as (draft,):
        _dump(draft, value, sort_keys)


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, with the metadata that PyTorch's loaders expect; same tensors, same bytes."""
    with _drafts([file]) as (draft,):
        _dump_tensors(draft, tensors)


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Callable[[], np.ndarray], int]], max_shard_bytes: int
) -> list[Path]:
    """Write ``model.safetensors``, or several files and their index, holding one file's tensors at a time.

    What is there is replaced when all has been written: an error midway leaves it as it was.

    Args:
      tensors: for each its name, a function that fetches it, and its bytes.
      max_shard_bytes: the most that one file holds, unless one tensor alone is larger.

    Returns:
      The files that were written.
    """
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    total = filled = 0
    for name, fetch, size in tensors:
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, fetch))
        filled, total = filled + size, total + size
    count = len(shards)
    files = [
        folder / ("model.safetensors" if count == 1 else f"model-{i:05}-of-{count:05}.safetensors")
        for i in range(1, count + 1)
    ]
    if count > 1:
        weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        files.append(folder / "model.safetensors.index.json")
    with _drafts(files) as drafts:
        for draft, shard in zip(drafts, shards, strict=False):
            _dump_tensors(draft, {name: fetch() for name, fetch in shard})
        if count > 1:
            _dump(drafts[-1], {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


@contextlib.contextmanager
def _drafts(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Where to write ``files``, which are replaced together when all are written, and else stay as they are."""
    drafts = [file.with_name(file.name + ".draft") for file in files]
    try:
        yield drafts
        for draft, file in zip(drafts, files, strict=True):
            os.replace(draft, file)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _dump(file: Path, value: Any, sort_keys: bool = True) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def _dump_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    save_file(contiguous, file, metadata={"format": "pt"})
