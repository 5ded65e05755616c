"""The merged weight and its gradient written out in numpy, in float64: what the adapted model is held against."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import LoraFactors

RANK = 50  # the einsum label of the rank; every other axis is labelled by its place in the weight


def merged(weight: Any, f: LoraFactors) -> Any:
    """``W + s·A·B``, with DoRA its columns rescaled to the magnitudes; rounded once to the weight's dtype."""
    return jnp.asarray(_full(weight, f) * _gain(weight, f), weight.dtype)


def pulled_back(gradient: Any, weight: Any, f: LoraFactors) -> LoraFactors:
    """The factors' gradient, given the merged weight's; DoRA's norms count as constants."""
    dims, g = list(range(weight.ndim)), _wide(gradient)
    to_a, to_b, to_m = _labels(f)
    inner = f.scale * g * _gain(weight, f)
    d_a = np.einsum(inner, dims, _wide(f.b), to_b, to_a)
    d_b = np.einsum(_wide(f.a), to_a, inner, dims, to_b)
    d_m = None
    if f.magnitude is not None:
        full = _full(weight, f)
        norm = np.sqrt(np.sum(full**2, f.axes.inputs, keepdims=True))
        d_m = np.einsum(g * full / norm, dims, to_m).astype(np.float32)
    return dataclasses.replace(f, a=d_a.astype(np.float32), b=d_b.astype(np.float32), magnitude=d_m)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.float32), np.float64)


def _labels(f: LoraFactors) -> tuple[list[int], list[int], list[int]]:
    batch, inputs, outputs = f.axes
    return [*batch, *inputs, RANK], [*batch, RANK, *outputs], [*batch, *outputs]


def _full(weight: Any, f: LoraFactors) -> np.ndarray:
    to_a, to_b, _ = _labels(f)
    return _wide(weight) + f.scale * np.einsum(_wide(f.a), to_a, _wide(f.b), to_b, list(range(weight.ndim)))


def _gain(weight: Any, f: LoraFactors) -> Any:
    if f.magnitude is None:
        return 1.0
    to_m = _labels(f)[2]
    magnitude = np.expand_dims(np.einsum(_wide(f.magnitude), to_m, sorted(to_m)), f.axes.inputs)
    return magnitude / np.sqrt(np.sum(_full(weight, f) ** 2, f.axes.inputs, keepdims=True))
