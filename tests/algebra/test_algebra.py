"""The laws of the algebra of adapters, over every layout of a weight at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.algebra.layouts import LAYOUTS, PARAMS, adapters, assert_same, flat, matrices, nearest, updates
from tests.messages import expect, message
from tests.toys import normal

algebra: Any = jlora
"""Results are factors or arrays: the tests know which."""
ONE, TWO, SMALL = adapters(10), adapters(50, scale=1.9), adapters(90, rank=2)
LIST: list[Any] = [ONE, TWO, SMALL]
WEIGHTS = (0.5, -1.5, 2.0)
DELTAS = [updates(tree) for tree in LIST]
SUM: Any = {path: sum(w * x[path] for w, x in zip(WEIGHTS, DELTAS, strict=True)) for path in LAYOUTS}


def widest(f: jlora.LoraFactors) -> int:
    """The largest rank that a weight can have."""
    return min(matrices_of(f)[0].shape[-2], matrices_of(f)[1].shape[-1])


def matrices_of(f: jlora.LoraFactors) -> tuple[np.ndarray, np.ndarray]:
    n = len(f.axes.batch)
    batch = f.a.shape[:n]
    return np.reshape(f.a, (*batch, -1, f.rank)), np.reshape(f.b, (*batch, f.rank, -1))


def test_cat_is_the_sum_and_svd_its_nearest_of_a_rank() -> None:
    """cat is exact; svd of the full rank is the same update; of a lower rank the best, by NumPy's SVD of the weight."""
    cat = algebra.add_weighted(LIST, WEIGHTS, "cat")
    assert_same(cat, SUM)
    assert {f.rank for f in cat.values()} == {8} and all(f.scale == 1 for f in cat.values())
    full = algebra.add_weighted(LIST, jnp.array(WEIGHTS), "svd", rank=8)
    assert_same(full, SUM)
    assert all(f.rank == min(8, widest(f)) for f in full.values())
    best = algebra.add_weighted(LIST, WEIGHTS, "svd", rank=2)
    for path, update in updates(best).items():
        np.testing.assert_allclose(matrices(path, update), nearest(path, SUM[path], 2), atol=2e-5, err_msg=path)
    assert {f.rank for f in algebra.add_weighted(LIST, WEIGHTS, "svd").values()} == {2, 3}


def test_a_single_adapter_is_kept_by_linear_and_scaled_by_its_weight() -> None:
    for weight in (0.3, -2.0):
        assert_same(
            algebra.add_weighted([TWO], [weight], "linear"), {path: weight * x for path, x in DELTAS[1].items()}
        )


def test_density_1_leaves_nothing_out() -> None:
    """magnitude_prune is then linear, and its svd form the nearest sum; TIES of one adapter is that adapter."""
    pruned = algebra.add_weighted(LIST[:2], WEIGHTS[:2], "magnitude_prune", density=1.0)
    assert_same(pruned, updates(algebra.add_weighted(LIST[:2], WEIGHTS[:2], "linear")))
    svd = algebra.add_weighted(LIST, WEIGHTS, "magnitude_prune_svd", density=1.0, rank=8)
    assert_same(svd, SUM, 5e-5)
    assert_same(algebra.add_weighted([ONE], [1.0], "ties", density=1.0), DELTAS[0])


def test_dare_has_the_sum_as_its_mean() -> None:
    """Random entries are dropped and the rest rescaled: over many keys the mean is the sum, and half is dropped."""
    one = {"experts": ONE["experts"]}

    def draw(key: Any) -> Any:
        return algebra.add_weighted([one], [2.0], "dare_linear_svd", density=0.5, rank=5, key=key)["experts"]

    drawn: Any = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
    each = updates_of_slices(drawn)
    expected = 2 * matrices("experts", DELTAS[0]["experts"])
    assert np.abs(each.mean(0) - expected).max() < 5 * np.abs(expected).max() / np.sqrt(400)
    dropped = np.abs(each) < 1e-5
    assert 0.48 < dropped.mean() < 0.52
    np.testing.assert_allclose(each[~dropped], np.broadcast_to(2 * expected, each.shape)[~dropped], atol=1e-4)
    assert not np.array_equal(dropped[0, 0], dropped[0, 1]), "slices have masks of their own"


def updates_of_slices(f: jlora.LoraFactors) -> np.ndarray:
    """The updates of many draws for the experts, ``[draws, slices, inputs, outputs]``."""
    return np.asarray(f.a @ f.b).reshape(len(f.a), -1, f.a.shape[-2], f.b.shape[-1])


def test_norms_distance_and_cosine_are_those_of_the_updates() -> None:
    one, two = map(flat, DELTAS[:2])
    norms = jlora.norms(ONE)
    for path, size in norms.items():
        np.testing.assert_allclose(size, np.linalg.norm(DELTAS[0][path]), rtol=1e-5)
    np.testing.assert_allclose(jlora.distance(ONE, TWO), np.linalg.norm(one - two), rtol=1e-5)
    np.testing.assert_allclose(jlora.cosine(ONE, TWO), one @ two / np.linalg.norm(one) / np.linalg.norm(two), atol=1e-6)
    size = np.linalg.norm(one)
    assert jlora.distance(ONE, ONE) < 1e-6 * size
    np.testing.assert_allclose(jlora.cosine(ONE, ONE), 1, atol=1e-6)
    np.testing.assert_allclose(jlora.cosine(ONE, algebra.negate(ONE)), -1, atol=1e-6)
    near = {path: dataclasses.replace(f, b=f.b.at[..., 0].add(1e-5)) for path, f in ONE.items()}
    apart = np.linalg.norm(flat(updates(near)) - one)
    assert abs(jlora.distance(ONE, near) - apart) < 1e-6 * size, "close updates are told apart"


def test_negated_and_scaled_updates() -> None:
    """Of narrow factors too: a sign is exact, a factor is multiplied in float32."""
    assert_same(algebra.negate(TWO), {path: -x for path, x in DELTAS[1].items()}, 0)
    assert_same(algebra.rescale(TWO, -0.3), {path: -0.3 * x for path, x in DELTAS[1].items()})
    other = {"matrix": TWO["matrix"]}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), other)
    assert algebra.negate(narrow)["matrix"].b.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("strict"):
        scaled: Any = algebra.rescale(narrow, 0.3)["matrix"]
        both = [narrow, other]
        mixed: Any = algebra.add_weighted(both, [1.0, 1.0], "cat")["matrix"]
        algebra.add_weighted(both, [1.0, 1.0], "ties_svd", density=0.5)
        algebra.add_weighted(both, [1.0, 1.0], "linear")
        assert jlora.distance(*both).dtype == jlora.cosine(*both).dtype == jnp.float32
    assert scaled.b.dtype == mixed.b.dtype == mixed.a.dtype == jnp.float32
    np.testing.assert_array_equal(scaled.b, narrow["matrix"].b.astype(jnp.float32) * jnp.float32(0.3))


def test_truncation_keeps_the_best_part() -> None:
    """Of the full rank it keeps the update, of a lower one the nearest by NumPy's SVD of the merged weight; the energy
    decides for the smallest rank that keeps it."""
    assert_same(algebra.truncate(TWO, rank=3), DELTAS[1])
    small: Any = algebra.truncate(TWO, rank=1)
    assert all(f.rank == 1 and f.scale == 1.9 for f in small.values())
    for path, update in updates(small).items():
        np.testing.assert_allclose(matrices(path, update), nearest(path, DELTAS[1][path], 1), atol=1e-5, err_msg=path)
    for energy in (0.5, 0.9, 1.0):
        kept: Any = algebra.truncate(TWO, energy=energy)
        for path, f in kept.items():
            s = np.linalg.svd(matrices(path, DELTAS[1][path]), compute_uv=False)[:, :3]
            shares = np.cumsum(np.square(s).sum(0)) / np.square(s).sum()
            assert shares[f.rank - 1] >= energy - 1e-6 and (f.rank == 1 or shares[f.rank - 2] < energy), path
    zero = jax.tree.map(jnp.zeros_like, ONE)
    assert {f.rank for f in algebra.truncate(zero, energy=0.9).values() if isinstance(f, jlora.LoraFactors)} == {1}


def test_a_path_that_one_lacks_counts_as_no_update() -> None:
    part = {"heads": TWO["heads"]}
    filled = part | {path: jax.tree.map(jnp.zeros_like, f) for path, f in TWO.items() if path != "heads"}
    options: dict[str, Any] = {"linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.5}}
    for method, own in options.items():
        lacking, zeros = (algebra.add_weighted([ONE, tree], [1.0, 0.5], method, **own) for tree in (part, filled))
        assert_same(lacking, updates(zeros))
    one, two = flat(DELTAS[0]), flat(updates(part))
    np.testing.assert_allclose(jlora.distance(part, ONE), np.linalg.norm(one - two), rtol=1e-5)
    np.testing.assert_allclose(
        jlora.cosine(ONE, part), one @ two / np.linalg.norm(one) / np.linalg.norm(two), atol=1e-6
    )
    assert jlora.cosine(ONE, {}) == 0


def test_all_of_it_is_pure() -> None:
    """The same under jit, with traced weights and factor."""

    def everything(one: Any, two: Any, w: Any, key: Any) -> Any:
        svd = algebra.add_weighted([one, two], w, "dare_ties_svd", density=0.7, rank=2, key=key)
        found, kept = algebra.extract(params, jlora.merge(params, one), plan)
        small = algebra.truncate(svd, rank=1)
        cosine = jlora.cosine(one, algebra.rescale(two, w[0]))
        products = [[f.a @ f.b for f in tree.values()] for tree in (svd, found, small)]
        return products, cosine, jlora.distance(one, two), jlora.norms(one), kept

    params = {"matrix": PARAMS["matrix"]}
    plan = jlora.plan(params, jlora.LoraConfig(rank=2, targets=("matrix",)))
    one, two = {"matrix": ONE["matrix"]}, {"matrix": TWO["matrix"]}
    w, key = jnp.array([0.5, -2.0]), jax.random.key(3)
    plain, jitted = everything(one, two, w, key), jax.jit(everything)(one, two, w, key)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), plain, jitted)
    text = message(TypeError, lambda: jax.jit(lambda x: algebra.truncate(x, energy=0.9))(one))
    expect(text, "truncate", "energy=0.9", "jax.jit", "pass rank=")


def test_no_array_has_the_size_of_a_weight() -> None:
    """In the programs of all but the sparse sums, which have one."""
    one, two = ({"w": jlora.LoraFactors(normal(i, 97, 3), normal(i, 3, 89))} for i in range(2))

    def lean(one: Any, two: Any) -> Any:
        sums = [algebra.add_weighted([one, two], [1.0, 2.0], method) for method in ("linear", "cat", "svd")]
        scaled = algebra.truncate(algebra.rescale(algebra.negate(one), 2.0), rank=1)
        return sums, scaled, jlora.norms(one), jlora.distance(one, two), jlora.cosine(one, two)

    def sparse(one: Any, two: Any) -> Any:
        return algebra.add_weighted([one, two], [1.0, 2.0], "ties_svd", density=0.5)

    sizes = [str(jax.make_jaxpr(fn)(one, two)) for fn in (lean, sparse)]
    found = ["97,89]" in text or "89,97]" in text for text in sizes]
    assert found == [False, True] and "97,3]" in sizes[0]


def test_leaves_trained_whole_take_part_by_their_difference_to_the_base() -> None:
    """With the base, each operation acts on ``leaf - base``; without it they are refused, and left out on advice."""
    params = PARAMS | {"bias": normal(7, 4)}
    one, two = ({**tree, "bias": params["bias"] + normal(i, 4)} for i, tree in enumerate((ONE, TWO)))
    changes = [np.asarray(tree["bias"] - params["bias"]) for tree in (one, two)]
    cat = algebra.add_weighted([one, two], [0.5, -1.0], "cat", params=params)
    np.testing.assert_allclose(cat["bias"] - params["bias"], 0.5 * changes[0] - changes[1], atol=1e-6)
    only = algebra.add_weighted([one, TWO], [0.5, 9.0], "cat", params=params)
    np.testing.assert_allclose(only["bias"] - params["bias"], 0.5 * changes[0], atol=1e-6)
    ties = algebra.add_weighted([one, two], [1.0, 1.0], "ties", density=1.0, params=params)
    same = np.sign(changes[0]) == np.sign(changes[1])
    larger = np.where(np.abs(changes[0]) > np.abs(changes[1]), *changes)
    np.testing.assert_allclose(ties["bias"] - params["bias"], np.where(same, sum(changes) / 2, larger), atol=1e-6)
    np.testing.assert_allclose(algebra.negate(one, params=params)["bias"] - params["bias"], -changes[0], atol=1e-6)
    third = algebra.rescale(one, 1 / 3, params=params)["bias"] - params["bias"]
    np.testing.assert_allclose(third, changes[0] / 3, atol=1e-6)
    vectors = [np.concatenate([flat(delta), change]) for delta, change in zip(DELTAS, changes, strict=False)]
    sizes = [np.linalg.norm(x) for x in vectors]
    np.testing.assert_allclose(
        jlora.distance(one, two, params=params), np.linalg.norm(vectors[0] - vectors[1]), rtol=1e-5
    )
    np.testing.assert_allclose(
        jlora.cosine(one, two, params=params), vectors[0] @ vectors[1] / sizes[0] / sizes[1], atol=1e-6
    )
    np.testing.assert_allclose(jlora.norms(one, params=params)["bias"], np.linalg.norm(changes[0]), rtol=1e-5)
    assert algebra.truncate(one, rank=1)["bias"] is one["bias"]
    calls = {
        "negate": lambda tree: algebra.negate(tree),
        "rescale": lambda tree: algebra.rescale(tree, 2.0),
        "norms": lambda tree: jlora.norms(tree),
        "distance": lambda tree: jlora.distance(ONE, tree),
        "cosine": lambda tree: jlora.cosine(tree, ONE),
        "add_weighted": lambda tree: algebra.add_weighted([tree], [1.0]),
    }
    for name, call in calls.items():
        expect(message(ValueError, lambda call=call: call(one)), name, "'bias'", "params=params")
        call({path: f for path, f in one.items() if isinstance(f, jlora.LoraFactors)})
    dora = {"matrix": dataclasses.replace(ONE["matrix"], magnitude=jnp.ones(5))}
    calls["truncate"] = lambda tree: algebra.truncate(tree, rank=1)
    for name, call in calls.items():
        expect(message(ValueError, lambda call=call: call(dora)), name, "DoRA", "'matrix'", "jlora.extract(params")
    plan = jlora.plan({"matrix": PARAMS["matrix"]}, jlora.LoraConfig(rank=5, targets=("matrix",)))
    base = {"matrix": PARAMS["matrix"]}
    plain, _ = algebra.extract(base, jlora.merge(base, dora), plan)
    np.testing.assert_allclose(jlora.merge(base, plain)["matrix"], jlora.merge(base, dora)["matrix"], atol=1e-5)


def test_what_cannot_be_combined_is_named() -> None:
    """Every path at once, with what to do; and options that do not belong to the method."""
    add = algebra.add_weighted
    text = message(ValueError, lambda: add([ONE, SMALL], [1.0, 1.0], "ties", density=0.5))
    expect(text, "'matrix': ranks [3, 2]", "'thin'", "method='ties_svd'", "'cat'")
    expect(message(ValueError, lambda: add([ONE, SMALL], [1.0, 1.0])), "'linear'", "method='svd'")
    for method in ("svd", "ties_svd"):
        add([ONE, SMALL], [1.0, 1.0], method, **({"density": 0.5} if method == "ties_svd" else {}))
    turned = {"matrix": dataclasses.replace(ONE["matrix"], axes=jlora.Axes((), (1,), (0,))), "thin": ONE["heads"]}
    text = message(ValueError, lambda: add([ONE, turned], [1.0, 1.0], "cat"))
    expect(text, "'matrix': axes", "'thin': axes", "2 differences")
    stacked = jlora.stack([ONE, TWO])
    expect(message(ValueError, lambda: jlora.norms(stacked)), "'matrix'", "(2, 6, 3)", "jlora.unstack", "jax.vmap")
    mapped = jax.vmap(jlora.norms)(stacked)
    np.testing.assert_allclose(mapped["experts"][1], jlora.norms(TWO)["experts"], rtol=1e-5)
    expect(message(ValueError, lambda: add([], [])), "no adapters")
    expect(message(ValueError, lambda: add([ONE], [1.0, 2.0])), "shape (2,)", "expected 1")
    expect(message(ValueError, lambda: add([ONE], [float("nan")])), "finite")
    broken = {"matrix": dataclasses.replace(ONE["matrix"], b=jnp.full((3, 5), jnp.nan))}
    expect(message(ValueError, lambda: add([ONE, broken], [1.0, 1.0])), "adapters 1", "NaN", "'matrix'")
    expect(message(TypeError, lambda: add([ONE], [1.0], "tie")), "'tie'", "closest: 'ties'")
    expect(message(TypeError, lambda: add([ONE], [1.0], "ties")), "needs density")
    expect(message(TypeError, lambda: add([ONE], [1.0], "dare_ties", density=0.5)), "needs key")
    options = {"density": 0.5, "key": jax.random.key(0), "majority_sign": "total"}
    expect(message(TypeError, lambda: add([ONE], [1.0], **options)), "no density", "no key", "no majority_sign")
    expect(message(TypeError, lambda: add([ONE], [1.0], "cat", rank=2)), "takes no rank")
    expect(message(ValueError, lambda: add([ONE], [1.0], "ties", density=0)), "density=0")
    expect(message(ValueError, lambda: add([ONE], [1.0], "ties", density=1, majority_sign="most")), "'frequency'")
    expect(message(TypeError, lambda: algebra.truncate(ONE)), "neither", "rank=", "energy=")
    expect(message(TypeError, lambda: algebra.truncate(ONE, rank=1, energy=0.5)), "rank and energy")
    expect(message(ValueError, lambda: algebra.truncate(ONE, rank=0)), "rank=0")
    expect(message(ValueError, lambda: algebra.truncate(ONE, energy=95)), "energy=95", "0.95")


def test_update_rules_are_expanded() -> None:
    """What a rule trains is no adapters tree; what it stands for is one."""
    params = {"matrix": PARAMS["matrix"]}
    rule = jlora.vera(jax.random.key(0), jlora.plan(params, jlora.LoraConfig(rank=3, targets=("matrix",))))
    trained = jax.tree.map(lambda x: x + 1, rule.init(jax.random.key(1), params))
    found = algebra.add_weighted([rule.adapters(trained), ONE], [1.0, 1.0], "cat")
    assert found["matrix"].rank == 6
    with pytest.raises(ValueError, match="matrix/u"):
        jlora.norms(trained)
    with pytest.raises(KeyError, match="matrix/u"):
        jlora.norms(trained, params=params)
    with pytest.raises(TypeError, match="Vera"):
        jlora.norms(rule)  # pyright: ignore[reportArgumentType]
