"""`add_weighted` gives the updates of peft's `add_weighted_adapter`, with the same random masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora._src.algebra import sparse
from tests.golden.make_algebra import ADAPTERS, CASES, FILE, TARGETS, computed
from tests.peft_cases import TOLERANCE, needs_peft, quiet

GOLDEN = load_file(FILE)
AXES = {"conv": jlora.Axes((), (0, 1, 2), (3,))}


def ours(name: str, array: np.ndarray) -> Any:
    """A factor or update of torch in our order of axes: outputs last, a filter as height, width, inputs, outputs."""
    return jnp.asarray(array.transpose(2, 3, 1, 0) if name == "conv" else array.T)


def factors(adapter: str, name: str) -> jlora.LoraFactors:
    a, b = (ours(name, GOLDEN[f"{adapter}.{name}.{side}"]) for side in "AB")
    b = b.reshape(b.shape[-2:])
    return jlora.LoraFactors(
        a, b, scale=ADAPTERS[adapter]["lora_alpha"] / ADAPTERS[adapter]["r"], axes=AXES.get(name, jlora.Axes())
    )


def assert_equals(case: str, found: Mapping[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module's update is peft's."""
    method, names, weights, options = CASES[case]
    count = sum(key.startswith(f"{case}: mask") for key in found)
    masks = iter([found[f"{case}: mask {i}"] for i in range(count)])

    def recorded(key: Any, shape: tuple[int, ...], density: float) -> Any:
        return jnp.stack([matrix(next(masks), shape[1:]) for _ in range(shape[0])]) > 0

    monkeypatch.setattr(sparse, "random_mask", recorded)
    own = {"svd_rank": "rank", "majority_sign_method": "majority_sign"}
    given: dict[str, Any] = {own.get(name, name): value for name, value in options.items()}
    given |= {"key": jax.random.key(0)} if "dare" in method else {}
    trees = [{name: factors(adapter, name) for name in TARGETS[adapter]} for adapter in names]
    combined = jlora.add_weighted(trees, weights, method, **given)  # pyright: ignore[reportArgumentType]
    assert [*combined] == TARGETS["one"] and next(masks, None) is None
    for name, f in combined.items():
        delta = found[f"{case}: {name}"]  # a table's has the axes of ours
        expected = jnp.asarray(delta) if name == "table" else ours(name, delta)
        merged = jlora.merge({name: jnp.zeros(expected.shape)}, {name: f})[name]
        np.testing.assert_allclose(merged, expected, atol=TOLERANCE, rtol=0)


def matrix(mask: np.ndarray, shape: tuple[int, ...]) -> Any:
    """A mask of torch as a matrix with the inputs first. No two sizes of these modules are equal."""
    if mask.ndim == 4:
        return jnp.asarray(mask.transpose(2, 3, 1, 0).reshape(shape))
    return jnp.asarray(mask if mask.shape == shape else mask.T)


@pytest.mark.parametrize("case", CASES)
def test_every_combination_equals_what_peft_computed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals(case, GOLDEN, monkeypatch)


@needs_peft
@pytest.mark.slow
def test_every_combination_equals_what_peft_computes_today(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        found = computed()
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in GOLDEN.items()}
    for name in (name for name in GOLDEN if name.split(".")[0] in ADAPTERS):
        np.testing.assert_array_equal(found[name], GOLDEN[name])
    for case in CASES:
        assert_equals(case, found, monkeypatch)
