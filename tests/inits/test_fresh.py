"""The random inits: their distributions, their zero product, and their place in a config."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.toys import TOYS

KEY = jax.random.key(0)


def drawn(name: Any, shape: tuple[int, ...] = (400, 300), rank: int = 8, **fields: Any) -> Any:
    config = jlora.LoraConfig(rank=rank, targets=("w",), init=name, **fields)
    return jlora.init(KEY, {"w": jnp.zeros(shape)}, config)["w"]


def test_kaiming_is_uniform() -> None:
    """Within ±1/sqrt(fan_in), with a variance of a third of that squared."""
    a = drawn("kaiming").a
    assert float(jnp.abs(a).max()) <= 1 / 20 < 1.001 * float(jnp.abs(a).max())
    assert float(a.var()) == pytest.approx(1 / 1200, rel=0.05)


@pytest.mark.parametrize("rank", [2, 8])
def test_gaussian_has_a_standard_deviation_of_one_over_rank(rank: int) -> None:
    f = drawn("gaussian", rank=rank)
    assert float(f.a.std()) == pytest.approx(1 / rank, rel=0.05) and float(f.a.mean()) == pytest.approx(0, abs=0.03)
    assert float(jnp.mean(f.a**4) / jnp.mean(f.a**2) ** 2) == pytest.approx(3, rel=0.15)  # a normal's kurtosis
    assert not f.b.any()


def test_orthogonal_factors_are_large_and_their_product_zero() -> None:
    f = drawn("orthogonal")
    for factor in (f.a, f.b):
        assert float(factor.var()) == pytest.approx(1 / 200, rel=0.1)
    np.testing.assert_allclose(f.a @ f.b, 0, atol=1e-7)
    assert np.linalg.matrix_rank(np.asarray(f.a)) == np.linalg.matrix_rank(np.asarray(f.b)) == 4


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_fresh_adapters_change_nothing_in_every_layout(toy: str, name: Any) -> None:
    """Slices of stacked weights have numbers of their own; tables keep A = 0 and a normal B; shapes under eval_shape
    and values under jit are those of a plain call."""
    fn, params, x = TOYS[toy]
    targets: Any = ("table",) if toy == "tied" else "all-linear"
    plan = jlora.plan(params, jlora.LoraConfig(rank=4, targets=targets, init=name), jlora.trace(fn, params, x))
    adapters: Any = jlora.init(KEY, params, plan)
    np.testing.assert_allclose(jlora.lora(fn)(jlora.attach(params, adapters), x), fn(params, x), atol=1e-5)
    jitted = jax.jit(lambda key: jlora.init(key, params, plan))(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jitted, adapters)
    shapes = jax.eval_shape(lambda: jlora.init(KEY, params, plan))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), adapters)
    for f in adapters.values():
        if toy == "tied":
            assert not f.a.any() and float(f.b.std()) > 0.5
        if f.axes.batch:
            assert not np.array_equal(f.a[0], f.a[1])


def test_the_init_is_in_the_plan_and_in_json() -> None:
    config = jlora.LoraConfig(
        rank=4, targets=("w", "v"), init="orthogonal", overrides=(jlora.Override("^v", rank=3, init="gaussian"),)
    )
    assert jlora.LoraConfig.from_json(config.to_json()) == config
    plan = jlora.plan({"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}, config)
    assert (plan["w"].init, plan["v"].init) == ("orthogonal", "gaussian")
    assert "r=4 s=4 orthogonal" in str(plan)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"init": "xavier"}, "init = 'xavier'.*'kaiming', 'gaussian', 'orthogonal'"),
        ({"init": "orthogonal", "rank": 3}, "rank = 3.*even"),
        ({"init": "orthogonal", "overrides": (jlora.Override("w", rank=5),)}, r"overrides\[0\].rank = 5.*even"),
        ({"rank": 3, "overrides": (jlora.Override("w", init="orthogonal"),)}, r"overrides\[0\].rank = 3.*even"),
    ],
)
def test_wrong_inits_are_named(fields: dict[str, Any], facts: str) -> None:
    with pytest.raises(ValueError, match=facts):
        jlora.LoraConfig(**fields)
