"""`quantize_array`: one weight in few bits. The shapes of its blocks, their scales and codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._src.quantization.scheme import Scheme
from jlora._src.quantized import DYNAMIC, NF4, QuantizedArray, block_shapes
from jlora._src.types import Array, Axes

GROUP = 256
"""The most scales that share a scale of their own."""
_DTYPES: dict[str, Any] = {
    "nf4": jnp.uint4,
    "int4": jnp.int4,
    "int8": jnp.int8,
    "fp8": jnp.float8_e4m3fn,
    "mxfp4": jnp.float4_e2m1fn,
}
_LARGEST: dict[str, float] = {"int4": 7.0, "int8": 127.0, "fp8": 448.0}
_TINY = 1e-35  # below it, the reciprocal of a float32 times `_LARGEST` overflows


def matrix_axes(ndim: int) -> Axes:
    """The roles of the axes of a stack of matrices."""
    return Axes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))


def quantize_array(array: Array, scheme: str | Scheme = "nf4", axes: Axes | None = None) -> QuantizedArray:
    """One weight, quantized: scales from the largest magnitude of each block, in float32. Works under ``jit``.

    >>> jnp.linalg.norm(jlora.quantize_array(weight, "nf4").dequantize() - weight)

    Args:
      array: a floating array of two or more axes. NaN and infinity are not checked.
      scheme: see `Scheme`.
      axes: the roles of its axes, as in `WeightUse`; by default the last two are inputs and outputs.

    Returns:
      A `QuantizedArray` of the array's shape and dtype. Along batch and output axes each entry has scales of its own.

    Raises:
      ValueError: if the array is not floating, or has fewer than two axes; or as `Scheme`.
    """
    scheme = Scheme.parse(scheme)
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim < 2:
        raise ValueError(
            f"quantize_array: got an array of shape {array.shape} and dtype {array.dtype}; expected a floating array "
            "of two or more axes"
        )
    axes = axes or matrix_axes(array.ndim)
    scales_shape = _scales_shape(array.shape, axes.inputs, scheme.block)
    blocks, own = block_shapes(array.shape, scales_shape)
    values = array.astype(jnp.float32).reshape(blocks)
    largest = _largest(values, own)
    if scheme.format == "mxfp4":
        # The OCP format: the exponent of the largest entry becomes that of float4's largest, 4 to 6.
        exponent = jnp.clip(jnp.frexp(largest)[1] - 3, -126, 127)
        scales = jnp.ldexp(jnp.float32(1), exponent)
        codes = jnp.clip(values / scales, -6, 6).astype(jnp.float4_e2m1fn)
        scales = scales.astype(jnp.float8_e8m0fnu)
    elif scheme.format == "nf4":
        scales = largest
        codes = _nearest(values * (1 / jnp.maximum(largest, _TINY)), NF4)
    else:
        scales = largest / _LARGEST[scheme.format]
        codes = values * (1 / jnp.maximum(largest, _TINY) * _LARGEST[scheme.format])
        codes = codes if scheme.format == "fp8" else jnp.round(codes)
    codes = codes.astype(_DTYPES[scheme.format]).reshape(array.shape)
    quantized = QuantizedArray(codes, scales.reshape(scales_shape), scheme=scheme.format, dtype=np.dtype(array.dtype))
    return _with_coded_scales(quantized, axes) if scheme.double else quantized


def _with_coded_scales(array: QuantizedArray, axes: Axes) -> QuantizedArray:
    """Double quantization (Dettmers et al. 2023, §3): the scales less their mean, in 8-bit codes with a dynamic
    exponent. As in bitsandbytes, neighbours along the inputs are grouped first, then outputs.
    """
    shape = array.scales.shape
    rest = tuple(i for i in range(len(shape)) if i not in axes.batch)
    offset = jnp.sum(array.scales, rest, keepdims=True) / max(math.prod(shape[i] for i in rest), 1)
    counts = list(shape)
    limit = GROUP
    for axis in (*reversed(axes.inputs), *reversed(axes.outputs)):
        size = _divisor(shape[axis], limit)
        counts[axis] //= size
        limit //= size
    blocks, own = block_shapes(shape, tuple(counts))
    values = (array.scales - offset).reshape(blocks)
    groups = _largest(values, own)
    codes = _nearest(values * (1 / jnp.maximum(groups, _TINY)), DYNAMIC).astype(jnp.uint8).reshape(shape)
    return dataclasses.replace(array, scales=codes, groups=groups.reshape(counts), offset=offset)


def _scales_shape(shape: tuple[int, ...], inputs: Sequence[int], block: int | None) -> tuple[int, ...]:
    """The number of blocks along each axis: a block takes the last input axis first, then those before it."""
    counts = list(shape)
    for i, axis in enumerate(reversed(inputs)):
        if block is None:
            size = shape[axis]
        else:
            size = _divisor(shape[axis], block) if i else _block(shape[axis], block)
            block //= max(size, 1)
        counts[axis] //= max(size, 1)
    return tuple(counts)


def _block(size: int, block: int) -> int:
    """The size of a block along an axis: the largest divisor up to ``block``; or, if that is less than half of it, the
    smallest one above."""
    if size <= block:
        return size
    smaller = _divisor(size, block)
    return smaller if 2 * smaller >= block else next(n for n in range(block + 1, size + 1) if size % n == 0)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of a size up to ``most``."""
    return next(n for n in range(min(max(size, 1), max(most, 1)), 0, -1) if size % n == 0)


def _largest(values: Array, own: Sequence[int]) -> Array:
    """The largest magnitude of each block; the axes of a block have size 1 in ``own``."""
    return jnp.max(jnp.abs(values), [i for i, n in enumerate(own) if n == 1], keepdims=True, initial=0)


def _nearest(values: Array, entries: Sequence[float] | np.ndarray) -> Array:
    """The index of the nearest of sorted entries; of the lower one, if two are as near."""
    table = np.asarray(entries, np.float32)
    middles = (table[:-1] + table[1:]) / 2
    if len(middles) < 16:  # one by one, they are fused with what comes before and after: no array of float32 is stored
        return sum(((values > middle).astype(jnp.uint8) for middle in middles), jnp.zeros((), jnp.uint8))
    return jnp.sum(values[..., None] > middles, -1, dtype=jnp.uint8)
