"""`QuantizedArray`: a frozen weight in few bits, one leaf of a tree of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.types import Array, StandsForArray, is_attached

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of the codes of ``nf4``, quantiles of a normal distribution (Dettmers et al. 2023, Appendix E)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(StandsForArray):
    """A frozen weight in few bits: ``values[codes] * scales``, computed in float32 and rounded once to ``dtype``.

    All arrays have as many axes as the weight. An axis of the scales divides the weight's: each scale holds for a block
    of entries. So an array is moved like the weight itself, and split over a mesh like it.

    Attributes:
      codes: of the weight's shape; uint4 codes of `NF4`, or int4, int8, float8 or float4 values.
      scales: float32, or uint8 codes of a scale (double quantization, Dettmers et al. 2023, §3).
      groups: None, or the float32 scales of coded ``scales``, in blocks of these.
      offset: None, or what is added to coded scales, float32.
      scheme: its name, see `quantize`. Static.
      dtype: of the dequantized weight. Static.
    """

    codes: Array
    scales: Array
    groups: Array | None = None
    offset: Array | None = None
    scheme: str = dataclasses.field(default="int8", metadata={"static": True})
    dtype: Any = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays; devices store two 4-bit codes in a byte."""
        return sum(-(-math.prod(x.shape) * _bits(x.dtype) // 8) for x in jax.tree.leaves(self))

    def dequantize(self) -> Array:
        """The weight, in ``dtype``."""
        values = _decoded(self.codes, NF4) if self.scheme == "nf4" else self.codes.astype(jnp.float32)
        blocks, scales = block_shapes(self.shape, self.scales.shape)
        weight = values.reshape(blocks) * self._float_scales().reshape(scales)
        return weight.reshape(self.shape).astype(self.dtype)

    def astype(self, dtype: Any) -> QuantizedArray:
        """The same codes, dequantized to another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def _advice(self) -> str:
        return (
            f"a quantized weight ({self.scheme}, shape {self.shape}) was passed to a function that does not support "
            "it. Wrap the function that takes the parameters: `apply = jlora.lora(model.apply)`, then call "
            "`apply(params, ...)`; or give the plain function `jlora.dequantize(params)`."
        )

    def _float_scales(self) -> Array:
        scales = self.scales
        if self.groups is not None:
            blocks, groups = block_shapes(scales.shape, self.groups.shape)
            scales = (_dynamic_values(scales).reshape(blocks) * self.groups.reshape(groups)).reshape(scales.shape)
        return (scales if self.offset is None else scales + self.offset).astype(jnp.float32)


def is_one_leaf(x: Any) -> bool:
    """Whether ``x`` is a leaf of a tree of parameters that is itself a tree: attached or quantized."""
    return is_attached(x) or isinstance(x, QuantizedArray)


def as_array(x: Any) -> Any:
    """A leaf as an array."""
    return x.dequantize() if isinstance(x, QuantizedArray) else x


def spec_of_blocks(blocks: Sequence[int], shape: Sequence[int], spec: Iterable[Any], mesh: Any) -> list[Any] | None:
    """The PartitionSpec entries of an array with a number of blocks along each axis of a weight that ``spec`` splits:
    the weight's, or none where one block has the whole axis. None if a block would be split."""
    entries = [*spec]
    entries += [None] * (len(shape) - len(entries))
    own = [None if count == 1 else entry for count, entry in zip(blocks, entries, strict=True)]
    parts = [math.prod(mesh.shape[axis] for axis in ((e,) if isinstance(e, str) else e or ())) for e in own]
    return None if any(count % n for count, n in zip(blocks, parts, strict=True)) else own


def _bits(dtype: Any) -> int:
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def block_shapes(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``shape`` with each axis that has several blocks split in two, and ``blocks`` to be broadcast to it."""
    whole: list[int] = []
    own: list[int] = []
    for size, count in zip(shape, blocks, strict=True):
        several = 1 < count < size
        whole += [count, size // count] if several else [size]
        own += [count, 1] if several else [count]
    return tuple(whole), tuple(own)


def _decoded(codes: Array, values: Sequence[float] | np.ndarray) -> Array:
    """``values[codes]`` in float32: a choice by each bit, which the compiler fuses with the product by the scales."""
    codes = codes.astype(jnp.uint8)
    found: list[Any] = [np.array(value, np.float32) for value in values]
    for bit in range(len(found).bit_length() - 1):
        odd = (codes >> bit) & 1 == 1
        found = [jnp.where(odd, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _dynamic_values(codes: Array) -> Array:
    """``DYNAMIC[codes]``, computed: the compiler does so again for each entry of a block, where a choice by each of
    eight bits takes 30 times as long as all the rest, and a lookup is slow on a TPU."""
    signed = codes.astype(jnp.int32) - 127
    size = jnp.abs(signed)
    found: Any = jnp.where(size == 0, np.float32(0), np.float32(1))
    for i in range(7):  # 2**i fractions between 0.1 and 1, times a power of ten
        start, step = np.float32(10.0 ** (i - 7)), np.float32(0.9 * 10.0 ** (i - 6) / 2**i)
        fraction = (size - 2**i).astype(jnp.float32) + np.float32(0.5)
        found = jnp.where((size >= 2**i) & (size < 2 ** (i + 1)), start + step * fraction, found)
    return jnp.where(signed < 0, -found, found)


def _dynamic() -> np.ndarray:
    """The 256 values of 8-bit codes with a dynamic exponent (Dettmers 2016, https://arxiv.org/abs/1511.04561), signed:
    sign, exponent of ten in unary, and a linear fraction of the bits left."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *-means]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC = _dynamic()
