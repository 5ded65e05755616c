"""Converts the arrays of one adapted layer between PEFT's layout and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jlora._src.engine.factors.named_axes import promoted_dtype
from jlora._src.types import Array, Axes, LoraFactors
from jlora.files.tensor_names import ModuleKind, from_torch, to_torch

Part: TypeAlias = str
"""One of a layer's arrays: ``a``, ``b`` or ``magnitude``."""

_PARTS: dict[Part, str] = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_EMBEDDING_PARTS: dict[Part, str] = {**_PARTS, "a": "lora_embedding_A", "b": "lora_embedding_B"}
SUFFIXES = (*_PARTS.values(), *list(_EMBEDDING_PARTS.values())[:2])
NDIM: Mapping[ModuleKind, int] = {"linear": 2, "conv1d": 2, "conv2d": 4, "embedding": 2}
"""The kinds of modules that PEFT adapts, and the number of axes of their weights."""


class Layer(NamedTuple):
    """The update of one layer.

    Attributes:
      a: [*inputs, rank].
      b: [rank, outputs].
      magnitude: None, or [outputs].
      scale: multiplies their product.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    def folded(self, scale: float) -> Layer:
        """The same update with another scale; ``b`` is multiplied by the quotient."""
        return self if scale == self.scale else self._replace(b=scaled(self.b, self.scale / scale), scale=scale)

    def minus(self, start: Layer) -> Layer:
        """The update without that of ``start``, of both ranks together, in float32 or wider."""
        dtype = np.promote_types(np.promote_types(self.a.dtype, start.a.dtype), np.float32)
        b = start.b.astype(dtype) * (start.scale / self.scale)
        return self._replace(
            a=np.concatenate([self.a.astype(dtype), start.a.astype(dtype)], -1),
            b=np.concatenate([self.b.astype(dtype), -b], 0),
        )

    def padded(self, rank: int) -> Layer:
        """The same update, padded with zeros to ``rank``."""
        more = rank - self.rank
        a = np.pad(self.a, [(0, 0)] * (self.a.ndim - 1) + [(0, more)])
        return self._replace(a=a, b=np.pad(self.b, [(0, more), (0, 0)]))


def scaled(b: np.ndarray, factor: float) -> np.ndarray:
    """``b * factor`` in the dtype of ``b`` if that is exact, else in float32."""
    wide = np.promote_types(b.dtype, np.float32) if b.dtype.kind == "f" else np.dtype(np.float32)
    product = b.astype(wide) * wide.type(factor)
    narrow = product.astype(b.dtype)
    return narrow if np.array_equal(narrow.astype(wide), product) else product


def parts(kind: ModuleKind) -> Mapping[Part, str]:
    """The suffix that PEFT appends to a module's name for each of its arrays."""
    return _EMBEDDING_PARTS if kind == "embedding" else _PARTS


def axes(kind: ModuleKind, stacked: bool) -> Axes:
    """The roles of our leaf's axes."""
    first, last = int(stacked), int(stacked) + NDIM[kind] - 1
    return Axes((0,) if stacked else (), tuple(range(first, last)), (last,))


def shapes(kind: ModuleKind, leaf: tuple[int, ...], rank: int) -> dict[Part, tuple[int, ...]]:
    """The shapes of PEFT's arrays for a weight (one layer) of our shape ``leaf``."""
    *inputs, out = leaf
    if kind == "conv2d":
        height, width, channels = inputs
        return {"a": (rank, channels, height, width), "b": (out, rank, 1, 1), "magnitude": (1, out, 1, 1)}
    return {"a": (rank, *inputs), "b": (out, rank), "magnitude": (out,)}


def leaf_shape(kind: ModuleKind, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `shapes`: our shape of a weight (one layer), from the shapes of PEFT's two factors."""
    if kind == "conv2d":
        _, channels, height, width = a
        return (height, width, channels, b[0])
    return (a[1], b[0])


def to_peft(layer: Layer, kind: ModuleKind) -> dict[Part, np.ndarray]:
    """A layer's arrays in PEFT's layout."""
    a, b, magnitude, _ = layer
    if kind == "conv2d":  # two convolutions; the second is 1 x 1
        found: dict[Part, np.ndarray] = {"a": to_torch(a, kind), "b": to_torch(b[None, None], kind)}
    else:
        found = {"a": a.T, "b": b.T}
    if magnitude is not None:
        found["magnitude"] = magnitude.reshape(1, -1, 1, 1) if kind == "conv2d" else magnitude
    return found


def from_peft(arrays: Mapping[Part, np.ndarray], kind: ModuleKind, scale: float) -> Layer:
    """The inverse of `to_peft`."""
    magnitude = arrays["magnitude"].reshape(-1) if "magnitude" in arrays else None
    if kind == "conv2d":
        return Layer(from_torch(arrays["a"], kind), from_torch(arrays["b"], kind)[0, 0], magnitude, scale)
    return Layer(arrays["a"].T, arrays["b"].T, magnitude, scale)


def layers_of(f: LoraFactors, stacked: bool) -> list[Layer]:
    """The layers of one leaf's factors; a single one if the leaf is not stacked."""
    a, b, magnitude = (None if x is None else np.asarray(x) for x in (f.a, f.b, f.magnitude))
    assert a is not None and b is not None
    if not stacked:
        return [Layer(a, b, magnitude, float(f.scale))]
    return [Layer(a[i], b[i], None if magnitude is None else magnitude[i], float(f.scale)) for i in range(len(a))]


def join(layers: Sequence[Layer], kind: ModuleKind, stacked: bool, dropout: float) -> LoraFactors:
    """One leaf's factors; the inverse of `layers_of`.

    Layers of unequal ranks and scales are converted to the largest rank, and the scale of a layer with that rank.
    """
    rank = max(layer.rank for layer in layers)
    scale = next((layer.scale for layer in layers if layer.rank == rank and layer.scale > 0), 1.0)
    layers = [layer.folded(scale).padded(rank) for layer in layers]
    a, b, magnitude = (
        None if any(x is None for x in arrays) else _stack([x for x in arrays if x is not None], stacked)
        for arrays in zip(*(layer[:3] for layer in layers), strict=True)
    )
    assert a is not None and b is not None
    return LoraFactors(a, b, magnitude, scale=scale, axes=axes(kind, stacked), dropout=dropout)


def _stack(arrays: Sequence[np.ndarray], stacked: bool) -> Array:
    dtype = promoted_dtype(*(x.dtype for x in arrays))
    return jnp.asarray(np.stack([x.astype(dtype) for x in arrays]) if stacked else arrays[0])
