"""`jlora.rounding` measures what merging loses: almost nothing in float32, most of a small update in bfloat16."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import Axes, LoraFactors


def lost(dtype: str, size: float) -> float:
    """The share that is lost of an update that is ``size`` times the base."""
    keys = jax.random.split(jax.random.key(0), 3)
    base = jax.random.normal(keys[0], (64, 128)).astype(dtype)
    a, b = jax.random.normal(keys[1], (64, 8)), jax.random.normal(keys[2], (8, 128)) * size / 8**0.5
    report = jlora.rounding({"w": base}, {"w": LoraFactors(a, b)})
    assert report.weights["w"] == (dtype, pytest.approx(size, rel=0.2))
    return report["w"]


@pytest.mark.parametrize(
    ("dtype", "size", "low", "high"),
    [
        ("float32", 1e-1, 1e-8, 1e-6),
        ("float32", 1e-3, 1e-6, 1e-4),
        ("bfloat16", 1e-1, 0.01, 0.025),
        ("bfloat16", 1e-2, 0.12, 0.20),
        ("bfloat16", 1e-3, 0.7, 0.9),
        ("bfloat16", 1e-5, 0.98, 1.01),
        ("float16", 1e-2, 0.01, 0.03),
        ("float16", 1e-3, 0.15, 0.25),
    ],
)
def test_what_one_rounding_takes(dtype: str, size: float, low: float, high: float) -> None:
    """The numbers of the docstring: the smaller the update relative to the weight, the more of it is lost."""
    assert low < lost(dtype, size) < high


def trees() -> tuple[Any, dict[str, Any]]:
    """A stack, a kernel of heads, a convolution with DoRA, a leaf trained whole, and one without an adapter."""
    keys = iter(jax.random.split(jax.random.key(1), 20))
    shapes = {"stack": (2, 6, 4), "heads": (6, 2, 3), "conv": (3, 3, 4, 5), "norm": (6,), "other": (4,)}
    params = {name: jax.random.normal(next(keys), shape, jnp.bfloat16) for name, shape in shapes.items()}
    axes = {"stack": Axes((0,), (1,), (2,)), "heads": Axes((), (0,), (1, 2)), "conv": Axes((), (0, 1, 2), (3,))}
    adapters: dict[str, Any] = {}
    for name, axis in axes.items():
        batch, inputs, outputs = axis.sizes(shapes[name])
        a, b = (jax.random.normal(next(keys), s) * 0.1 for s in ((*batch, *inputs, 2), (*batch, 2, *outputs)))
        adapters[name] = LoraFactors(a, b, scale=0.5, axes=axis)
    magnitude = 1 + jax.random.uniform(next(keys), (5,))
    adapters["conv"] = dataclasses.replace(adapters["conv"], magnitude=magnitude)
    adapters["norm"] = params["norm"].astype(jnp.float32) * 1.001
    return params, adapters


def test_it_is_what_merge_does() -> None:
    """The shares are those of `merge` against the same merge into float32, for every layout, DoRA and whole leaves."""
    params, adapters = trees()
    report = jlora.rounding(params, adapters)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    merged, exact = (jax.jit(jlora.merge)(tree, adapters) for tree in (params, wide))
    assert list(report) == list(adapters)
    for path in adapters:
        update = np.linalg.norm(exact[path] - wide[path])
        taken = np.linalg.norm(merged[path].astype(np.float32) - exact[path])
        assert report[path] == pytest.approx(taken / update, rel=1e-2), path


def test_an_update_of_zero_loses_nothing() -> None:
    params = {"w": jnp.ones((8, 8), jnp.bfloat16)}
    adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=2, targets=("w",)))
    assert jlora.rounding(params, adapters) == {"w": 0.0}


def test_a_sum_beyond_the_dtype_is_infinite() -> None:
    params = {"w": jnp.full((4, 4), 6e4, jnp.float16)}
    assert jlora.rounding(params, {"w": LoraFactors(jnp.ones((4, 1)), jnp.full((1, 4), 6e4))}) == {"w": float("inf")}


def test_it_prints_as_a_table() -> None:
    params, adapters = trees()
    lines = str(jlora.rounding(params, adapters)).splitlines()
    assert lines[0].split("  ")[0] == "weight" and "lost by rounding" in lines[0]
    assert lines[2].startswith("stack") and "bfloat16" in lines[2] and lines[2].endswith("%")
    assert lines[-1].startswith("most is lost in norm: ")
    assert str(jlora.rounding(params, {})).endswith("nothing is merged")


def test_it_refuses_what_merge_refuses() -> None:
    params, adapters = trees()
    with pytest.raises(ValueError, match="rounding: NaN or infinity in the adapters of 1 of 4.*\n.*'norm'"):
        jlora.rounding(params, {**adapters, "norm": jnp.full(6, jnp.nan)})
    with pytest.raises(KeyError, match="rounding: no leaf.*\n.*nrom.*closest: 'norm'"):
        jlora.rounding(params, {"nrom": adapters["norm"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("factors", ["bfloat16", "float16"])
def test_narrow_factors_and_a_scale_round_once(dtype: str, factors: str) -> None:
    """Merged is the float64 sum rounded once, whatever dtype the factors have; `unmerge` and `rounding` agree."""
    keys = jax.random.split(jax.random.key(2), 3)
    base = jax.random.normal(keys[0], (64, 32)).astype(dtype)
    a, b = (jax.random.normal(k, s).astype(factors) for k, s in zip(keys[1:], ((64, 4), (4, 32)), strict=True))
    params, adapters = {"w": base}, {"w": LoraFactors(a, b, scale=2.12)}
    merged = jlora.merge(params, adapters)["w"]
    assert merged.dtype == base.dtype
    update = 2.12 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    exact = np.asarray(base, np.float64) + update
    ulp = 2e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=ulp, atol=ulp)
    share = np.linalg.norm(np.asarray(merged, np.float64) - exact) / np.linalg.norm(update)
    assert jlora.rounding(params, adapters)["w"] == pytest.approx(share, rel=0.01 if dtype != "float32" else 10)
    back = np.asarray(jlora.unmerge({"w": merged}, adapters)["w"], np.float64)
    expected = np.asarray(merged, np.float64) - update
    np.testing.assert_allclose(back, expected, rtol=ulp, atol=ulp)
