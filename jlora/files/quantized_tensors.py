"""Weights that a checkpoint stores in few bits: by bitsandbytes (NF4, int8), or in float8 with scales.

>>> tensors = stored_weights(open_checkpoint(folder, float8=True), config["quantization_config"], "bfloat16")
>>> tensors["model.layers.0.mlp.up_proj.weight"].read_parts()
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora._src.quantized import DYNAMIC, NF4, QuantizedArray
from jlora.files.errors import TensorError, first_bullets
from jlora.files.safetensors import Tensor
from jlora.messages import shown


class QuantizedTensor(NamedTuple):
    """A weight of a checkpoint in few bits; the counterpart of `Tensor`.

    Attributes:
      file: the safetensors file.
      name: the name of its codes.
      shape, dtype: of the dequantized weight, in PyTorch's order of axes.
      read_parts: reads it, as a `QuantizedArray` of NumPy arrays in PyTorch's order.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read_parts: Callable[[], QuantizedArray]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The dequantized weight, or ``weight[index]``."""
        whole = np.asarray(self.read_parts().dequantize())
        return whole[index] if index else whole


def why_unsupported(quantization: Any) -> str | None:
    """Why a checkpoint with this ``quantization_config`` cannot be read; None if it can."""
    config = quantization if isinstance(quantization, Mapping) else {"quant_method": quantization}
    method = config.get("quant_method")
    if method == "bitsandbytes" and config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") != "nf4":
        return f"the checkpoint is quantized ({method!r}, {config.get('bnb_4bit_quant_type', 'fp4')!r})"
    if method == "compressed-tensors" and config.get("format") != "float-quantized":
        return f"the checkpoint is quantized ({method!r}, {config.get('format')!r})"
    if method not in ("bitsandbytes", "fp8", "compressed-tensors"):
        return f"the checkpoint is quantized ({method!r})"
    return None


def scheme_of(quantization: Mapping[str, Any]) -> str:
    """The name of the `jlora.Scheme` of a ``quantization_config`` for which `why_unsupported` is None."""
    if quantization["quant_method"] == "bitsandbytes":
        return "nf4" if quantization.get("load_in_4bit") else "int8"
    return "fp8"


def stored_weights(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, dtype: Any
) -> dict[str, Tensor | QuantizedTensor]:
    """The tensors of a checkpoint, with a `QuantizedTensor` for each weight in few bits, and without its scales.

    Args:
      tensors: by name.
      quantization: ``quantization_config`` in config.json, for which `why_unsupported` is None; or None.
      dtype: of the dequantized weights, where their tensors do not say.

    Raises:
      TensorError: listing every weight whose codes or scales are missing, or of another shape or form.
    """
    found: dict[str, Tensor | QuantizedTensor] = {}
    used: set[str] = set()
    wrong: list[str] = []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        try:
            states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
            if state := next((state for state in states if state in tensors), None):
                found[name] = _nf4(tensors, name, state)
                used |= {other for other in tensors if other.startswith(f"{name}.")}
            elif f"{module}.SCB" in tensors and name != module:
                found[name] = _int8(tensors, name, np.dtype(dtype))
                used |= {f"{module}.SCB", f"{module}.weight_format"}
            elif tensor.dtype == ml_dtypes.float8_e4m3fn:
                found[name] = _fp8(tensors, name, quantization, np.dtype(dtype))
                used |= {f"{module}.{part}" for part in (*_FP8_SCALES, "input_scale", "activation_scale")}
            elif quantization is not None and name != module and tensor.dtype.kind in "iu":
                wrong.append(f"{name!r} of dtype {tensor.dtype} has no scales")
        except _Unfit as error:
            wrong.append(f"{name!r}: {error}")
    if wrong:
        file = next(iter(tensors.values())).file
        raise TensorError(
            f"{file}: {len(wrong)} quantized weight(s) cannot be read:{first_bullets(wrong)}\nExpected NF4 or int8 of "
            "bitsandbytes as transformers writes them, or float8_e4m3fn with scales; or load the original checkpoint."
        )
    return {**{name: tensor for name, tensor in tensors.items() if name not in used}, **found}


def _array(codes: Any, scales: Any, **others: Any) -> QuantizedArray:
    """A weight whose arrays are NumPy's."""
    return QuantizedArray(codes, scales, **others)


class _Unfit(Exception):
    """Tensors that do not describe a weight."""


def _part(tensors: Mapping[str, Tensor], name: str, size: int, dtype: str) -> Tensor:
    """A tensor with this number of entries."""
    if name not in tensors:
        raise _Unfit(f"{name!r} is missing")
    tensor = tensors[name]
    if math.prod(tensor.shape) != size or tensor.dtype != dtype:
        raise _Unfit(f"{name!r} has shape {tensor.shape}, {tensor.dtype}; expected {size} entries of {dtype}")
    return tensor


def _nf4(tensors: Mapping[str, Tensor], name: str, state_name: str) -> QuantizedTensor:
    """bitsandbytes' NF4: packed codes, the largest magnitude of each block, and perhaps these in 8 bits."""
    try:
        state = json.loads(tensors[state_name].read().tobytes())
        kind, block, dtype = state["quant_type"], int(state["blocksize"]), np.dtype(DTYPES[state["dtype"]])
        out, inputs = (int(size) for size in state["shape"])
        nested = int(state["nested_blocksize"]) if "nested_blocksize" in state else None
        offset = np.float32(state.get("nested_offset", 0))
        if kind != "nf4" or min(block, out, inputs, nested or 1) < 1 or not np.isfinite(offset):
            raise ValueError(f"quant_type {kind!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unfit(f"{state_name!r} is not the state of an NF4 matrix ({shown(error)})") from error
    size = out * inputs
    codes = _part(tensors, name, -(-size // 2), "uint8")
    largest = _part(tensors, f"{name}.absmax", -(-size // block), "float32" if nested is None else "uint8")
    table = _part(tensors, f"{name}.quant_map", 16, "float32").read()
    if not np.allclose(table.ravel(), NF4, rtol=0, atol=1e-6):
        raise _Unfit(f"{name + '.quant_map'!r} differs from NF4's values")
    groups: Any = nested and _part(tensors, f"{name}.nested_absmax", -(-math.prod(largest.shape) // nested), "float32")
    values: Any = nested and _part(tensors, f"{name}.nested_quant_map", 256, "float32")

    def read() -> QuantizedArray:
        packed = codes.read().ravel()
        unpacked = np.stack([packed >> 4, packed & 15], -1).ravel()[:size].reshape(out, inputs)
        parts: dict[str, Any] = {"scales": largest.read().ravel()}
        if nested:
            of_groups = (groups.read().ravel(), values.read().ravel(), offset, nested)
            parts = _nested(parts["scales"], *of_groups, (out, inputs), block)
        if parts["scales"].ndim == 1:  # one for each block, which may end in the middle of a row
            own = math.gcd(inputs, block)
            parts["scales"] = parts["scales"][np.arange(0, size, own) // block].reshape(out, inputs // own)
        return _array(unpacked.astype(ml_dtypes.uint4), **parts, scheme="nf4", dtype=dtype)

    return QuantizedTensor(codes.file, name, (out, inputs), dtype, read)


def _nested(
    codes: np.ndarray, groups: np.ndarray, table: np.ndarray, offset: Any, size: int, shape: tuple[int, int], block: int
) -> dict[str, Any]:
    """Coded scales with their groups, if these are whole rows, or parts of a row; else float32 scales."""
    out, inputs = shape
    row = inputs // block
    if inputs % block == 0 and np.allclose(table, DYNAMIC, rtol=0, atol=1e-6):
        counts = None
        if groups.size == 1:
            counts = (1, 1)
        elif size % row == 0 and out % (size // row) == 0:
            counts = (out // (size // row), 1)
        elif row % size == 0:
            counts = (out, row // size)
        if counts is not None:
            coded = {"scales": codes.reshape(out, row), "groups": groups.reshape(counts)}
            return {**coded, "offset": np.full((1, 1), offset, np.float32)}
    return {"scales": table[codes] * np.repeat(groups, size)[: codes.size] + offset}


def _int8(tensors: Mapping[str, Tensor], name: str, dtype: np.dtype) -> QuantizedTensor:
    """bitsandbytes' int8: 127 is the largest magnitude of each row."""
    module = name.removesuffix(".weight")
    codes = tensors[name]
    if codes.dtype != "int8" or len(codes.shape) != 2:
        raise _Unfit(f"shape {codes.shape}, {codes.dtype}; expected an int8 matrix")
    largest = _part(tensors, f"{module}.SCB", codes.shape[0], "float32")
    if (layout := tensors.get(f"{module}.weight_format")) is not None and np.any(layout.read() != 0):
        raise _Unfit(f"{module + '.weight_format'!r} is not 0: its rows are in an order of one kind of GPU")

    def read() -> QuantizedArray:
        scales = largest.read().reshape(-1, 1) / np.float32(127)
        return _array(codes.read(), scales, scheme="int8", dtype=dtype)

    return QuantizedTensor(codes.file, name, codes.shape, dtype, read)


_FP8_SCALES = ("weight_scale_inv", "weight_scale")
"""Both multiply the weight: "inverse" is that of the factor with which it was quantized."""


def _fp8(
    tensors: Mapping[str, Tensor], name: str, quantization: Mapping[str, Any] | None, dtype: np.dtype
) -> QuantizedTensor:
    """float8 codes with one scale, one for each row, or one for each block of rows and columns."""
    module, codes = name.removesuffix(".weight"), tensors[name]
    stored = next((tensors[full] for part in _FP8_SCALES if (full := f"{module}.{part}") in tensors), None)
    if stored is None or quantization is None:
        raise _Unfit("float8 without scales (weight_scale_inv or weight_scale), or without a quantization_config")
    if len(codes.shape) != 2:
        raise _Unfit(f"shape {codes.shape}; expected a float8 matrix")
    out, inputs = codes.shape
    rows, columns = quantization.get("weight_block_size") or (out, inputs)
    if math.prod(stored.shape) == out and stored.shape in ((out,), (out, 1)):
        rows, columns = 1, inputs
    elif math.prod(stored.shape) == 1:
        rows, columns = out, inputs
    if math.prod(stored.shape) != (blocks := (-(-out // rows), -(-inputs // columns)))[0] * blocks[1]:
        raise _Unfit(f"{stored.name!r} has shape {stored.shape}; expected {blocks}, one scale, or one a row")

    def read() -> QuantizedArray:
        scales = stored.read().astype(np.float32).reshape(blocks)
        for axis, (size, block) in enumerate(((out, rows), (inputs, columns))):
            if size % block:  # the last block is shorter: in parts that divide the axis
                own = math.gcd(size, block)
                scales = scales.take(np.arange(0, size, own) // block, axis)
        return _array(codes.read(), scales, scheme="fp8", dtype=dtype)

    return QuantizedTensor(codes.file, name, codes.shape, dtype, read)


DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
