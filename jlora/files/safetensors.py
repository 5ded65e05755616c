"""Safetensors files: tensors read lazily and in slices, files written atomically."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.files.drafts import drafts
from jlora.files.errors import TensorError
from jlora.files.hub_files import WEIGHTS, WEIGHTS_INDEX, WEIGHTS_PATTERN, pickled_files
from jlora.files.json_files import json_text, read_json
from jlora.messages import bullets

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
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
_CHUNK_ENTRIES = 2**18


class Tensor(NamedTuple):
    """A tensor in a file. `read` reads only its values, or a slice of them.

    Attributes:
      file: the safetensors file.
      name: the tensor's name in that file.
      shape, dtype: as stored.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The array, or ``array[index]``.

        Each call maps the file again, so that its pages do not stay in this process's memory.

        Raises:
          TensorError: if it holds NaN or infinity.
        """
        if self.dtype.itemsize == 1 and self.dtype.kind == "V":
            return self._read_float8()[index or ()]
        with safe_open(self.file, "np") as file:
            # A slice of a scalar is an error in safetensors.
            array = file.get_tensor(self.name) if not index else file.get_slice(self.name)[index]
        if not is_finite(array):
            raise TensorError(
                f"{self.file}: the tensor {self.name!r} holds NaN or infinity. Expected finite weights; the file is "
                "damaged, or the training that wrote it diverged."
            )
        return array

    def _read_float8(self) -> np.ndarray:
        """The array from its bytes: safetensors has no float8 of NumPy."""
        with self.file.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            start, _ = json.loads(file.read(length))[self.name]["data_offsets"]
        count = math.prod(self.shape)
        array = np.fromfile(self.file, self.dtype, count, offset=8 + length + start).reshape(self.shape)
        if np.isnan(array).any():
            raise TensorError(f"{self.file}: the tensor {self.name!r} holds NaN. Expected finite weights.")
        return array


def is_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity; True for integers and booleans."""
    if array.dtype.kind in "biu" or not array.size:
        return True
    if array.dtype.itemsize == 2:
        # NumPy compares 16-bit floats one by one; comparing their bits, sign masked, is a hundred times faster.
        infinity = int(np.array(np.inf, array.dtype).view(np.uint16))
        bits = array.view(np.uint16).ravel()
        return all(
            int((bits[i : i + _CHUNK_ENTRIES] & 0x7FFF).max()) < infinity for i in range(0, bits.size, _CHUNK_ENTRIES)
        )
    # A NaN or infinite entry makes one of these NaN or infinite; no array of booleans is needed.
    return bool(np.isfinite(np.max(array)) and np.isfinite(np.min(array)))


def open_tensors(file: Path, *, float8: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Reads only the header.

    Args:
      float8: whether tensors of these dtypes are expected: those of quantized weights.

    Raises:
      TensorError: if the file is not safetensors, is truncated, or has a dtype that JAX lacks.
    """
    try:
        with safe_open(file, "np") as opened:
            found = {name: (part := opened.get_slice(name)).get_shape() + [part.get_dtype()] for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise TensorError(f"{file} is not a complete safetensors file ({error}). Fetch or export it again.") from error
    known: dict[str, Any] = {**_DTYPES, **(_FLOAT8 if float8 else {})}
    if odd := {name: entry[-1] for name, entry in found.items() if entry[-1] not in known}:
        raise TensorError(
            f"{file}: JAX has no dtype for these tensors:{bullets(f'{n}: {d}' for n, d in odd.items())}\nExpected one "
            f"of {', '.join(known)}. Quantized checkpoints need a quantization_config: load the original checkpoint."
        )
    return {name: Tensor(file, name, tuple(shape), np.dtype(known[dtype])) for name, (*shape, dtype) in found.items()}


def open_checkpoint(folder: Path, *, float8: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, in ``model.safetensors`` or the files listed in its index.

    Raises:
      TensorError: if the folder has neither file; or the index names files that are missing, are outside of the
        folder, or that lack a tensor.
    """
    if (folder / WEIGHTS).is_file():
        return open_tensors(folder / WEIGHTS, float8=float8)
    if not (folder / WEIGHTS_INDEX).is_file():
        raise TensorError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{_what_instead(folder)}")
    weight_map = _read_index(folder / WEIGHTS_INDEX)
    files = {name: open_tensors(folder / name, float8=float8) for name in sorted(set(weight_map.values()))}
    lacking = [f"{tensor!r} is not in {file}" for tensor, file in weight_map.items() if tensor not in files[file]]
    if lacking:
        raise TensorError(
            f"{folder / WEIGHTS_INDEX} and the files disagree:{bullets(lacking)}\nFetch the checkpoint again."
        )
    return {tensor: files[file][tensor] for tensor, file in weight_map.items()}


def _what_instead(folder: Path) -> str:
    """The end of an error: what a folder without weights contains instead."""
    if not (pickled := pickled_files(folder)):
        return f". Expected one of them; the folder has {sorted(file.name for file in folder.glob('*'))}."
    return (
        f"; it has {', '.join(pickled)}, which is pickled: reading it could run any code, so it is not read. Convert "
        "it where you trust it: `model = AutoModel.from_pretrained(folder)`, then `model.save_pretrained(new_folder)`, "
        "which writes safetensors."
    )


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, from a checkpoint's index; all files exist in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise TensorError(f"{index}: expected a `weight_map` from tensor names to file names, got {weight_map!r:.200}")
    wanted = sorted(set(weight_map.values()))
    if outside := [name for name in wanted if Path(name).name != name or "\\" in name or name in ("", "..")]:
        raise TensorError(
            f"{index} names files outside of its folder: {outside}. Expected file names; do not use this checkpoint."
        )
    if missing := [name for name in wanted if not (index.parent / name).is_file()]:
        raise TensorError(f"{index} names files that do not exist: {missing}. Fetch the checkpoint again.")
    return weight_map


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file with the metadata that PyTorch's loaders expect. Equal tensors give equal bytes."""
    with drafts(file) as (draft,):
        _dump(draft, tensors)


class PendingTensor(NamedTuple):
    """A tensor to write.

    Attributes:
      fetch: returns the array.
      size: in bytes.
    """

    fetch: Callable[[], np.ndarray]
    size: int


def write_checkpoint(folder: Path, tensors: Mapping[str, PendingTensor], max_shard_bytes: int) -> list[Path]:
    """Write ``model.safetensors``, or several files and their index. Holds the tensors of one file in memory at a time.

    Existing files are replaced after all are written; after an error they are unchanged.

    Args:
      folder: an existing folder.
      tensors: by name.
      max_shard_bytes: the size limit of one file, unless a single tensor is larger.

    Returns:
      The written files.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.size
    count = len(shards)
    suffixes = [f"-{i:05}-of-{count:05}" for i in range(1, count + 1)] if count > 1 else [""]
    files = {folder / WEIGHTS_PATTERN.format(suffix=s): names for s, names in zip(suffixes, shards, strict=True)}
    index = [folder / WEIGHTS_INDEX] if count > 1 else []
    with drafts(*files, *index) as paths:
        for path, names in zip(paths, files.values(), strict=False):
            _dump(path, {name: tensors[name].fetch() for name in names})
        if index:
            size = sum(tensor.size for tensor in tensors.values())
            weight_map = {name: file.name for file, names in files.items() for name in names}
            paths[-1].write_text(json_text({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return [*files, *index]


def _dump(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    save_file(contiguous, file, metadata={"format": "pt"})
