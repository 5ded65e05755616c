"""Reads a leaf from its tensors onto its devices, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jlora._src.types import Array
from jlora.files.errors import TensorError
from jlora.files.quantized_tensors import QuantizedTensor
from jlora.files.safetensors import Tensor, is_finite
from jlora.files.tensor_names import TensorName, to_torch, torch_axes

CHUNK_BYTES = 16 * 2**20


def read_leaf(tensors: Sequence[Tensor], name: TensorName, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    """One leaf on its devices; reads only the slices of this process's devices."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    parts: dict[tuple[range, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        ranges = tuple(range(size)[s] for s, size in zip(index, shape, strict=True))
        if ranges in parts:  # several devices may hold the same part
            return parts[ranges]
        out = _aligned_empty(tuple(map(len, ranges)), dtype)
        one = index[1:] if name.stacked else index
        axes = torch_axes(name.kind, len(one))
        for i, layer in enumerate(ranges[0] if name.stacked else (0,)):
            _read_into(out[i] if name.stacked else out, tensors[layer], name, [one[j] for j in np.argsort(axes)])
        parts[ranges] = out
        return out

    whole = tuple(slice(0, size) for size in shape)
    if sharding is None:
        return jax.device_put(part(whole), may_alias=True)
    return jax.make_array_from_callback(shape, sharding, part)


def are_equal(one: Tensor | QuantizedTensor, other: Tensor | QuantizedTensor) -> bool:
    """Whether two tensors hold the same values; reads a few rows at a time."""
    if one.shape != other.shape:
        return False
    return all(np.array_equal(one.read(rows), other.read(rows)) for rows in _chunks(one, range(one.shape[0])))


def _chunks(tensor: Tensor | QuantizedTensor, rows: range) -> Iterator[tuple[slice]]:
    """Slices of about `CHUNK_BYTES` each that together cover ``rows``."""
    count = max(1, CHUNK_BYTES // max(1, tensor.dtype.itemsize * math.prod(tensor.shape[1:])))
    for start in range(0, len(rows), count):
        yield (slice(rows[start], rows[min(start + count, len(rows)) - 1] + 1),)


def _read_into(out: np.ndarray, tensor: Tensor, name: TensorName, index: Sequence[slice]) -> None:
    """Fill ``out`` with ``tensor[index]`` in our order of axes, a few PyTorch rows at a time."""
    if not tensor.shape:
        _cast_into(out, tensor.read(), tensor)
        return
    target = to_torch(out, name.kind)
    rows = range(tensor.shape[0])[index[0]]
    for (part,) in _chunks(tensor, rows):
        array = tensor.read((part, *index[1:]))
        _cast_into(target[part.start - rows.start : part.stop - rows.start], array, tensor)


def _cast_into(out: np.ndarray, array: np.ndarray, tensor: Tensor) -> None:
    with np.errstate(over="ignore"):
        out[...] = array
    if out.dtype != array.dtype and not is_finite(out):
        raise TensorError(
            f"{tensor.file}: the tensor {tensor.name!r} of dtype {array.dtype} exceeds the range of {out.dtype}. "
            "Pass a param_dtype with a larger range, such as float32 or bfloat16."
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An empty array, aligned so that JAX's CPU backend can use its memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)
