"""Weights of every layout in one tree, with random adapters, and their updates by NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import jlora
from tests.toys import normal

LAYOUTS: dict[str, tuple[tuple[int, ...], jlora.Axes]] = {
    "matrix": ((6, 5), jlora.Axes()),
    "heads": ((2, 7, 3), jlora.Axes((), (1,), (0, 2))),
    "experts": ((2, 5, 3, 6), jlora.Axes((2, 0), (3,), (1,))),
    "filter": ((2, 2, 3, 4), jlora.Axes((), (0, 1, 2), (3,))),
    "thin": ((7, 2), jlora.Axes()),
}
"""Shape and axes of each weight; ``thin`` has fewer outputs than its adapters have ranks."""
PARAMS = {path: normal(i, *shape) for i, (path, (shape, _)) in enumerate(LAYOUTS.items())}


def adapters(seed: int, rank: int = 3, scale: float = 0.7) -> dict[str, jlora.LoraFactors]:
    """Random factors of every weight."""

    def one(i: int, shape: tuple[int, ...], axes: jlora.Axes) -> jlora.LoraFactors:
        batch, inputs, outputs = axes.sizes(shape)
        a, b = normal(seed + 2 * i, *batch, *inputs, rank), normal(seed + 2 * i + 1, *batch, rank, *outputs)
        return jlora.LoraFactors(a, b, scale=scale, axes=axes)

    return {path: one(i, *layout) for i, (path, layout) in enumerate(LAYOUTS.items())}


def updates(tree: Any) -> dict[str, np.ndarray]:
    """``scale · a·b`` of each weight, float64; no update for a path that is missing."""

    def one(path: str) -> np.ndarray:
        shape, axes = LAYOUTS[path]
        if path not in tree:
            return np.zeros(shape)
        f, order = tree[path], sum(axes, ())
        batch, inputs, outputs = (math.prod(sizes) for sizes in axes.sizes(shape))
        a = np.asarray(f.a, np.float64).reshape(batch, inputs, f.rank)
        b = np.asarray(f.b, np.float64).reshape(batch, f.rank, outputs)
        return f.scale * (a @ b).reshape([shape[i] for i in order]).transpose(np.argsort(order))

    return {path: one(path) for path in LAYOUTS}


def matrices(path: str, weight: np.ndarray) -> np.ndarray:
    """The weight as ``[slices, inputs, outputs]``."""
    shape, axes = LAYOUTS[path]
    batch, inputs, outputs = (math.prod(sizes) for sizes in axes.sizes(shape))
    return weight.transpose(sum(axes, ())).reshape(batch, inputs, outputs)


def nearest(path: str, weight: np.ndarray, rank: int) -> np.ndarray:
    """The matrices nearest to a weight's of a rank, by NumPy."""
    u, s, vh = np.linalg.svd(matrices(path, weight), full_matrices=False)
    return (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]


def flat(tree: dict[str, np.ndarray]) -> np.ndarray:
    """All entries of a tree's updates."""
    return np.concatenate([x.ravel() for x in tree.values()])


def assert_same(found: Any, expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """The updates of adapters, up to float32's rounding."""
    for path, update in updates(found).items():
        np.testing.assert_allclose(update, expected[path], atol=tolerance, err_msg=path)
