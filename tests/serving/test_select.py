"""`select`: each row of a batch with an adapter of its own gives what it gives alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlora
from tests.messages import expect, message
from tests.toys import TOYS, Toy, assert_close, normal
from tests.zoo import MODELS, Model

IDS = np.array([1, -1, 0, 1, 1], np.int32)
CONVOLUTION = Toy(
    lambda p, x: (
        jax.nn.relu(
            jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        ).mean((1, 2))
        @ p["out"]
    ),
    {"k": normal(0, 3, 3, 4, 5), "out": normal(1, 5, 3)},
    normal(2, 5, 6, 6, 4),
)
MODELS_OF_ROWS = {name: TOYS[name]._replace(x=TOYS[name].x[:5]) for name in ("mlp", "tied", "stacked")}
MODELS_OF_ROWS["convolution"] = CONVOLUTION


def drawn(params: Any, uses: Any, seed: int, **config: Any) -> Any:
    """Random adapters of every weight that is multiplied or looked up; magnitudes are positive."""
    targets = tuple(f"^{re.escape(path)}$" for path, use in uses.items() if use.kind in ("matmul", "lookup"))
    config = {"rank": 2, "alpha": 2.0, "targets": targets, "exclude": ()} | config
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), params, jlora.LoraConfig(**config), uses))
    rng = np.random.default_rng(seed)

    def draw(label: str, x: Any) -> Any:
        array = rng.uniform(0.5, 1.5, x.shape) if label == "magnitude" else rng.normal(0, 0.3, x.shape)
        return np.asarray(array, x.dtype)

    return jax.tree.map(draw, jlora.labels(shapes), shapes)


def stack(adapters: list[Any]) -> Any:
    """Their `jlora.stack`, made by one program, as NumPy arrays: nothing compiles to take them apart."""
    return jax.device_get(jax.jit(jlora.stack)(adapters))


def several(toy: Toy, **config: Any) -> list[Any]:
    """Three adapters of ranks and scales of their own."""
    uses = jlora.trace(toy.fn, toy.params, toy.x)
    return [drawn(toy.params, uses, seed=i, **{"rank": i + 1} | config) for i in range(3)]


@functools.cache
def compiled(fn: Any) -> Any:
    """The adapted model."""
    return jax.jit(jlora.lora(fn, materialize="error"))


def one_by_one(toy: Toy, adapters: list[Any], ids: Any, **options: Any) -> Any:
    """Each row as a batch of its own."""
    padded = jlora.unstack(stack(adapters))  # so that one program is enough

    def alone(i: int, row: int) -> Any:
        key: Any = {k: jax.random.fold_in(v, row) for k, v in options.items()}
        tree = toy.params if i < 0 else jlora.attach(toy.params, padded[i], **key)
        return compiled(toy.fn)(tree, toy.x[row : row + 1])

    return np.concatenate([alone(int(i), row) for row, i in enumerate(ids)])


NO_VMAP = ("plain.experts_ragged",)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", sorted({*MODELS} - {*NO_VMAP}))
def test_each_row_is_its_own_run(name: str) -> None:
    """Any model of the zoo, with the base among the adapters, row by row and in groups of two."""
    model = MODELS[name]()
    uses = jlora.trace(model.fn, model.params, *model.args)
    stacked = stack([drawn(model.params, uses, seed=i, rank=i + 1) for i in range(2)])
    arrays, static = eqx.partition(model.args, eqx.is_array)
    rows = jax.tree.map(lambda x: jnp.stack([_changed(x, i) for i in range(len(IDS))]), arrays)
    params, rest = eqx.partition(model.params, eqx.is_array)

    def fn(params: Any, rows: Any) -> Any:
        """The model for each row of a batch."""

        def one(i: int) -> Any:
            return _results(model, params, eqx.combine(jax.tree.map(lambda x: x[i], rows), static))

        results = [one(i) for i in range(len(jax.tree.leaves(rows)[0]))]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *results)

    apply = jlora.lora(fn, materialize="allow")

    @jax.jit
    def alone(params: Any, adapters: Any, rows: Any) -> Any:
        return apply(jlora.attach(eqx.combine(params, rest), adapters), rows)

    @jax.jit
    def mixed(params: Any, stacked: Any, ids: Any, rows: Any) -> Any:
        trees = [jlora.attach(eqx.combine(params, rest), jlora.select(stacked, ids, group_size=n)) for n in (1, 2)]
        return [apply(tree, rows) for tree in trees]

    none = jax.tree.map(jnp.zeros_like, jlora.unstack(stacked)[0])
    every = [none, *jlora.unstack(stacked)]
    singles = [alone(params, every[i + 1], jax.tree.map(lambda x, r=r: x[r : r + 1], rows)) for r, i in enumerate(IDS)]
    expected = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x, np.float64) for x in xs]), *singles)
    tolerance = 3e-2 if "bfloat16" in name else 1e-5
    for got in mixed(params, stacked, IDS, rows):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max(initial=0)))


def _changed(x: Any, row: int) -> Any:
    return x * (1 + row / 8) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _results(model: Model, params: Any, args: Any) -> Any:
    """The floating results, without the state that a model returns."""
    results = model.fn(params, *args)
    floats = eqx.filter(results[0] if isinstance(results, tuple) else results, eqx.is_inexact_array)
    return jax.tree.leaves(floats)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS_OF_ROWS)
def test_results_and_gradients_are_those_of_single_runs(name: str, dora: bool) -> None:
    """Gathered and grouped; ranks and scales mixed; every adapter has the sum of its own rows' gradients."""
    toy = MODELS_OF_ROWS[name]
    stacked = stack(several(toy, use_dora=dora))
    weights = 1.0 + np.arange(len(IDS))

    def loss(y: Any, weights: Any) -> Any:
        return jnp.sum(jnp.sin(3 * y) * weights[:, None])

    @jax.jit
    def alone(adapters: Any, x: Any, weight: Any) -> Any:
        return jax.grad(lambda a: loss(compiled(toy.fn)(jlora.attach(toy.params, a), x), weight))(adapters)

    @functools.partial(jax.jit, static_argnums=2)
    def mixed(stacked: Any, ids: Any, size: int) -> Any:
        def run(stacked: Any) -> Any:
            rows = jlora.select(stacked, ids, group_size=size)
            y = jlora.lora(toy.fn, materialize="error")(jlora.attach(toy.params, rows), toy.x)
            return loss(y, weights), y

        return jax.grad(run, has_aux=True)(stacked)

    every = jlora.unstack(stacked)
    grads = [jax.tree.map(np.zeros_like, one) for one in every]
    for row, i in enumerate(IDS):
        if i >= 0:
            own = alone(every[i], toy.x[row : row + 1], weights[row : row + 1])
            grads[i] = jax.tree.map(np.add, grads[i], own)
    for size in (1, 2):
        found, y = mixed(stacked, IDS, size)
        assert_close(y, one_by_one(toy, every, IDS))
        assert_close(found, jax.tree.map(lambda *x: np.stack(x), *grads), 5e-5)


@pytest.mark.slow
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=12), st.integers(1, 5))
def test_rows_are_grouped_in_any_order(ids: list[int], size: int) -> None:
    """Any ids, any size of a group."""
    toy = TOYS["mlp"]._replace(x=TOYS["mlp"].x[: len(ids)])
    adapters = several(toy)
    rows = jlora.select(stack(adapters), ids, group_size=size)
    assert_close(compiled(toy.fn)(jlora.attach(toy.params, rows), toy.x), one_by_one(toy, adapters, ids))


def test_each_row_drops_as_alone() -> None:
    """Row i has the dropout key folded with i: layers of a scan, and a run-time strength too."""
    toy = MODELS_OF_ROWS["stacked"]
    adapters, key = several(toy, dropout=0.5), jax.random.key(3)
    rows = jlora.select(stack(adapters), IDS)
    found = compiled(toy.fn)(jlora.attach(toy.params, rows, dropout_key=key), toy.x)
    assert_close(found, one_by_one(toy, adapters, IDS, dropout_key=key))
    assert np.any(np.abs(found - compiled(toy.fn)(jlora.attach(toy.params, rows), toy.x)) > 0.01)
    halves = [{p: dataclasses.replace(f, scale=f.scale / 2) for p, f in a.items()} for a in adapters]
    found = compiled(toy.fn)(jlora.attach(toy.params, rows, strength=0.5), toy.x)
    assert_close(found, one_by_one(toy, halves, IDS))


def test_leaves_trained_whole_are_of_their_rows() -> None:
    """A row of the base has the base's leaf, in the base's dtype."""
    toy = MODELS_OF_ROWS["mlp"]
    adapters = [a | {"bias": toy.params["bias"] + i, "w1": toy.params["w1"] * i} for i, a in enumerate(several(toy))]
    toy = toy._replace(params=toy.params | {"w1": toy.params["w1"].astype(jnp.bfloat16)})
    for size in (1, 3):
        tree = jlora.attach(toy.params, jlora.select(stack(adapters), IDS, group_size=size))
        assert_close(compiled(toy.fn)(tree, toy.x), one_by_one(toy, adapters, IDS))


def test_a_quantized_base_is_shared() -> None:
    toy = MODELS_OF_ROWS["mlp"]
    base = jlora.quantize(toy.params, "int8", jlora.trace(toy.fn, toy.params, toy.x))
    adapters = several(toy)
    tree = jlora.attach(base, jlora.select(stack(adapters), IDS))
    toy = toy._replace(params=jlora.dequantize(base))
    assert_close(compiled(toy.fn)(tree, toy.x), one_by_one(toy, adapters, IDS))


def test_a_row_is_touched_by_no_other_adapter() -> None:
    """NaN in one adapter is in its rows alone, not in those of the base; a traced id that is not there gives NaN."""
    toy = MODELS_OF_ROWS["mlp"]
    adapters = several(toy, use_dora=True)
    broken = [jax.tree.map(lambda x: x * np.nan, adapters[0]), *adapters[1:]]
    expected = one_by_one(toy, adapters, IDS)

    @jax.jit
    def run(stacked: Any, ids: Any) -> Any:
        return compiled(toy.fn)(jlora.attach(toy.params, jlora.select(stacked, ids)), toy.x)

    found = run(stack(broken), IDS)
    assert np.isnan(found[2]).all()
    assert_close(found[IDS != 0], expected[IDS != 0])
    for wrong in (3, -2):
        ids = np.where(IDS == 0, wrong, IDS)
        found = run(stack(adapters), ids)
        assert np.isnan(found[2]).all()
        assert_close(found[IDS != 0], expected[IDS != 0])
    program: Any = run
    assert program._cache_size() == 1


def test_the_work_is_that_of_the_rows() -> None:
    """The base's product is one for all rows; groups read few factors, and compute at most a tenth more."""
    rows, width = 64, 64
    params = {"w0": normal(0, width, width), "w1": normal(1, width, width)}
    toy = Toy(lambda p, x: jnp.tanh(x @ p["w0"]) @ p["w1"], params, normal(2, rows, width))
    stacked = stack(several(toy, rank=4)[:2])
    apply = jlora.lora(toy.fn)

    def compiled(size: int) -> Any:
        chosen = jlora.select(stacked, np.arange(rows) % 2, group_size=size)
        return chosen, jax.jit(apply).lower(jlora.attach(params, chosen), toy.x).compile()

    single: Any = jax.jit(apply).lower(jlora.attach(params, jlora.unstack(stacked)[0]), toy.x[:1]).compile()
    per_row = 2 * 2 * (width * width + 2 * 4 * width)
    for size, most in ((1, 1.02), (2, 1.1)):
        chosen, program = compiled(size)
        flops = program.cost_analysis()["flops"]
        assert per_row * rows <= flops < most * max(per_row, single.cost_analysis()["flops"]) * rows
        assert chosen["w0"].value.a.shape[0] == (rows if size == 1 else 34)


def test_rows_on_other_axes_are_stated() -> None:
    """Arguments and results as of `jax.vmap`: axes, what all rows share, prefixes of trees; keyword arguments."""
    toy = MODELS_OF_ROWS["mlp"]
    adapters = several(toy)
    expected = one_by_one(toy, adapters, IDS)

    def fn(params: Any, x: Any, both: Any, *, more: Any, flag: bool) -> Any:
        y = toy.fn(params, x.T) + both["own"][:, None] + both["shared"] + more[:, None]
        return {"y": y.T, "flag": flag}, both["shared"] * 2

    shared, own = jnp.arange(8.0), jnp.arange(5.0)
    apply = jlora.per_row(
        jlora.lora(fn), in_axes=(None, 1, {"own": 0, "shared": None}), out_axes=({"y": -1, "flag": None}, None)
    )
    for size in (1, 2):
        tree = jlora.attach(toy.params, jlora.select(stack(adapters), IDS, group_size=size))
        found, twice = apply(tree, toy.x.T, {"own": own, "shared": shared}, more=own * 2, flag=True)
        assert_close(found["y"].T, expected + 3 * own[:, None] + shared)
        assert found["flag"] is True
        np.testing.assert_array_equal(twice, shared * 2)
    plain = jlora.per_row(jlora.lora(toy.fn), in_axes=(None, 7))
    assert_close(plain(jlora.attach(toy.params, adapters[0]), toy.x), one_by_one(toy, adapters, [0] * 5))


def test_select_is_detached_explained_and_traced() -> None:
    toy = MODELS_OF_ROWS["mlp"]
    rows = jlora.select(stack(several(toy)), IDS)
    tree = jlora.attach(toy.params, rows)
    params, again = jlora.detach(tree)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, ((params, again), (toy.params, rows))), strict=True))
    found = jlora.explain(toy.fn, tree, toy.x)
    assert {event.path for event in found.events} == {"w0", "w1"} and not found.materialized
    assert jlora.trace(toy.fn, tree, toy.x) == jlora.trace(toy.fn, toy.params, toy.x)


def test_what_has_no_rows_is_named() -> None:
    """Every argument and every result, and what to state instead."""
    toy = MODELS_OF_ROWS["mlp"]
    rows = jlora.select(stack(several(toy)), IDS)
    tree = jlora.attach(toy.params, rows)
    text = message(ValueError, lambda: jlora.lora(toy.fn)(tree, toy.x[:4]))
    expect(text, "5 rows", "[1] has shape (4, 8), expected 5 at axis 0", "in_axes of jlora.per_row")
    text = message(ValueError, lambda: jlora.lora(lambda p, x: {"loss": toy.fn(p, x).sum()})(tree, toy.x))
    expect(text, "result['loss'] has shape (), expected 1 at axis 0", "out_axes of jlora.per_row")
    text = message(ValueError, lambda: jlora.lora(lambda p, x: (toy.fn(p, x), p))(tree, toy.x))
    expect(text, "result[1]['w0'] is an attached or quantized weight", "return no weights")
    apply = jlora.per_row(jlora.lora(toy.fn), in_axes=(None,))
    expect(message(ValueError, lambda: apply(tree, toy.x)), "1 entries for 2 arguments")
    expect(message(TypeError, lambda: toy.fn(tree, toy.x)), "jlora.lora(model.apply)")


@pytest.mark.parametrize("name", NO_VMAP)
def test_what_jax_cannot_map_is_named(name: str) -> None:
    """JAX maps no ragged product with a shared weight; the way out that the error names works."""
    model = MODELS[name]()
    uses = jlora.trace(model.fn, model.params, *model.args)
    adapters = drawn(model.params, uses, seed=0)
    rows = [jnp.stack([x, x]) for x in model.args]

    def fn(params: Any, *rows: Any) -> Any:
        return jnp.stack([model.fn(params, *(x[i] for x in rows)) for i in range(len(rows[0]))])

    tree = jlora.attach(model.params, jlora.select(stack([adapters]), [0, -1]))
    text = message(NotImplementedError, lambda: jlora.lora(fn)(tree, *rows))
    expect(text, "ragged_dot", "jlora.attach(params, adapters), rows")
    assert jlora.lora(fn)(jlora.attach(model.params, adapters), *rows).shape[0] == 2


def test_what_cannot_be_selected_is_named() -> None:
    toy = MODELS_OF_ROWS["mlp"]
    adapters = several(toy)
    stacked: Any = stack(adapters)
    expect(message(ValueError, lambda: jlora.select(stacked, [0, 3])), "from 0 to 3 for a stack of 3", "0 to 2, or -1")
    expect(message(ValueError, lambda: jlora.select(stacked, [-2])), "from -2 to -2")
    expect(message(ValueError, lambda: jlora.select(stacked, np.zeros(2))), "dtype float64", "integers [rows]")
    expect(message(ValueError, lambda: jlora.select(stacked, 0)), "shape ()")
    expect(message(ValueError, lambda: jlora.select(stacked, [0], group_size=0)), "group_size = 0")
    expect(message(ValueError, lambda: jlora.select(adapters[0], [0])), "select: these have no leading axis")
    rows: Any = jlora.select(stacked, IDS)
    for use in (jlora.merge, jlora.save):
        first: Any = toy.params if use is jlora.merge else "nowhere"
        text = message(TypeError, lambda use=use, first=first: use(first, rows))
        expect(text, "RowAdapters", "jlora.attach alone", "jlora.unstack")
    small = {p: dataclasses.replace(r, value=jax.tree.map(lambda x: x[:, :4], r.value)) for p, r in rows.items()}
    expect(message(ValueError, lambda: jlora.attach(toy.params, small)), "'w0': weight of shape (8, 16)")
