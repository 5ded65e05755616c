"""`extract`: adapters from two trees of parameters, over every layout of a weight at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.algebra.layouts import LAYOUTS, PARAMS, adapters, matrices, nearest, updates
from tests.messages import expect, message
from tests.toys import normal

algebra: Any = jlora
"""Results are factors or arrays: the tests know which."""
USES = {path: jlora.WeightUse(shape, jnp.dtype("float32"), (jlora.Use("dot_general", axes, ""),))
        for path, (shape, axes) in LAYOUTS.items()}  # fmt: skip
CONFIG = jlora.LoraConfig(rank=2, alpha=3, targets=tuple(LAYOUTS))
PLAN = jlora.plan(PARAMS, CONFIG, USES)
TUNED: Any = jlora.merge(PARAMS, adapters(10, rank=2))
WHOLE = {path: normal(90 + i, *shape, scale=0.1) for i, (path, (shape, _)) in enumerate(LAYOUTS.items())}


def test_an_update_of_the_rank_is_recovered() -> None:
    """What `merge` added is found again, with the plan's scale, and all energy is kept."""
    found, kept = algebra.extract(PARAMS, TUNED, PLAN)
    given = updates(adapters(10, rank=2))
    for path, update in updates(found).items():
        np.testing.assert_allclose(update, given[path], atol=1e-5, err_msg=path)
        np.testing.assert_allclose(kept[path], 1, atol=1e-5)
        np.testing.assert_allclose(kept.changes[path], np.linalg.norm(given[path]), rtol=1e-5)
    assert all(f.scale == 1.5 and f.rank == 2 for f in found.values())
    expect(str(kept), "energy kept", "kept in all: 100.00%")


@pytest.mark.slow
def test_a_full_change_is_approximated_best() -> None:
    """By NumPy's SVD of each slice; the energy kept is the share of its squared singular values, and rank or energy
    take the place of the plan's rank."""
    tuned = {path: PARAMS[path] + WHOLE[path] for path in LAYOUTS}
    found, kept = algebra.extract(PARAMS, tuned, CONFIG, USES, rank=1)
    for path, update in updates(found).items():
        change = np.asarray(WHOLE[path], np.float64)
        np.testing.assert_allclose(matrices(path, update), nearest(path, change, 1), atol=1e-5, err_msg=path)
        s = np.linalg.svd(matrices(path, change), compute_uv=False)
        np.testing.assert_allclose(kept[path], np.square(s[:, 0]).sum() / np.square(s).sum(), rtol=1e-4)
    assert {f.scale for f in found.values()} == {3.0}
    enough, share = algebra.extract(PARAMS, tuned, PLAN, energy=0.8)
    for path in LAYOUTS:
        assert share[path] >= 0.8 - 1e-5
        less = algebra.extract(PARAMS, tuned, PLAN, rank=max(1, enough[path].rank - 1))[1]
        assert share.ranks[path] == 1 or less[path] < 0.8
    random, close = algebra.extract(PARAMS, tuned, PLAN, rank=1, niter=6, key=jax.random.key(0))
    assert jlora.distance(random, found) < 1e-3
    np.testing.assert_allclose(float(close.total), float(kept.total), atol=1e-4)
    expect(
        message(TypeError, lambda: jax.jit(lambda x: algebra.extract(PARAMS, x, PLAN, energy=0.8))(tuned)), "pass rank="
    )


def test_leaves_are_taken_whole_or_named() -> None:
    """Those of train_also come from the tuned tree; what else changed is an error, and its advice works."""
    base, tuned = (
        PARAMS | {"norm": normal(1, 4), "bias": normal(2, 4)},
        TUNED | {"norm": normal(3, 4), "bias": normal(2, 4)},
    )
    uses = USES | {path: jlora.WeightUse((4,), jnp.dtype("float32")) for path in ("norm", "bias")}
    text = message(ValueError, lambda: algebra.extract(base, tuned, CONFIG, uses))
    expect(text, "1 leaves changed", "'norm'", "train_also", "same values")
    assert "'bias'" not in text
    config = jlora.LoraConfig(rank=2, targets=tuple(LAYOUTS), train_also=("norm",))
    found, kept = algebra.extract(base, tuned, config, uses)
    np.testing.assert_array_equal(found["norm"], tuned["norm"])
    assert "norm" not in kept and set(kept) == set(LAYOUTS)
    again, _ = algebra.extract(base, tuned | {"norm": base["norm"]}, CONFIG, uses)
    assert set(again) == set(LAYOUTS)


def test_dora_and_narrow_and_quantized_weights() -> None:
    """DoRA's magnitudes are those of the tuned weight; differences are taken in float32; a quantized base counts as
    the weight that it stands for."""
    config = jlora.LoraConfig(rank=2, targets=("matrix", "experts"), use_dora=True)
    base: Any = {path: PARAMS[path] for path in ("matrix", "experts")}
    tuned = {path: TUNED[path] for path in base}
    dora, _ = algebra.extract(base, tuned, config, USES)
    merged = jlora.merge(base, dora)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, tuned)
    narrow = {path: x.astype(jnp.bfloat16) for path, x in base.items()}
    plan = jlora.plan(base, jlora.LoraConfig(rank=5, targets=("matrix", "experts")), USES)
    found, _ = algebra.extract(narrow, tuned, plan)
    whole = jlora.merge({path: x.astype(jnp.float32) for path, x in narrow.items()}, found)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole, tuned)
    quantized = jlora.quantize(base, "int8", USES)
    found, _ = algebra.extract(quantized, tuned, plan)
    whole = jlora.merge(jlora.dequantize(quantized), found)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole, tuned)


def test_what_cannot_be_compared_is_named() -> None:
    wrong: Any = TUNED | {"extra": normal(0, 2), "thin": normal(0, 2, 7)}
    del wrong["matrix"]
    text = message(ValueError, lambda: algebra.extract(PARAMS, wrong, PLAN))
    expect(
        text, "'matrix' is missing in tuned", "'extra' is missing in base", "'thin' has shape (7, 2) in base and (2, 7)"
    )
    nan = TUNED | {"heads": TUNED["heads"] * jnp.nan}
    expect(message(ValueError, lambda: algebra.extract(PARAMS, nan, PLAN)), "NaN", "'heads'")
    shapes = jax.eval_shape(lambda: TUNED)
    expect(message(TypeError, lambda: algebra.extract(PARAMS, shapes, PLAN)), "shapes", "matrix")
    expect(message(TypeError, lambda: algebra.extract(PARAMS, TUNED, PLAN, niter=2)), "niter and key belong together")
    key = jax.random.key(0)
    expect(message(TypeError, lambda: algebra.extract(PARAMS, TUNED, PLAN, energy=0.9, niter=2, key=key)), "pass rank=")
