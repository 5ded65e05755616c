"""LoRA on unmodified models: Flax Linen, Flax NNX, Haiku, Equinox and plain functions (see `zoo`)."""

from __future__ import annotations

import dataclasses
import functools
import re
from concurrent import futures
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jlora
from jlora._src.engine.rules.control_flow import OWN_DERIVATIVE
from tests.zoo import MODELS, Model, merged, pulled_back

COMPILING = futures.ThreadPoolExecutor(max_workers=2)
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def uses_of(name: str) -> dict[str, jlora.WeightUse]:
    model = MODELS[name]()
    return jlora.trace(model.fn, model.params, *model.args)


@functools.cache
def shapes_of(name: str, use_dora: bool = False) -> Any:
    """The shapes of rank 2 adapters for every weight in the model's tables, lookups included."""
    model = MODELS[name]()
    targets = tuple(f"^{re.escape(path)}$" for path in (*model.axes, *model.tables))
    config = jlora.LoraConfig(rank=2, alpha=3, targets=targets, exclude=(), use_dora=use_dora)
    return jax.eval_shape(lambda: jlora.init(jax.random.key(0), model.params, config, uses_of(name)))


def random_like(adapters: Any, seed: int = 0) -> Any:
    """Adapters with every factor random, so that every update has an effect; magnitudes are positive."""
    rng = np.random.default_rng(seed)

    def draw(label: str, x: Any) -> Any:
        array = rng.uniform(0.5, 1.5, x.shape) if label == "magnitude" else rng.normal(0, 0.5, x.shape)
        return jnp.asarray(array, x.dtype)

    return jax.tree.map(draw, jlora.labels(adapters), adapters)


def fresh_like(adapters: Any, tables: Any) -> Any:
    """Adapters as `jlora.init` makes them: B is zero; for a looked-up table, A is."""

    def fresh(path: str, f: jlora.LoraFactors) -> jlora.LoraFactors:
        zero = "a" if path in tables else "b"
        return dataclasses.replace(f, **{zero: jnp.zeros_like(getattr(f, zero))})

    return {path: fresh(path, f) for path, f in random_like(adapters).items()}


class Run(NamedTuple):
    """What a model returns, and the gradient of a loss over all of it."""

    results: Any
    grads: Any


def loss_of(results: Any) -> Any:
    """A sum in which every entry of every floating result counts differently."""
    floats = [x for x in jax.tree.leaves(results) if eqx.is_inexact_array(x)]
    return sum(jnp.vdot(np.cos(np.arange(x.size, dtype=np.float32)), x.ravel().astype(jnp.float32)) for x in floats)


def compiled(model: Model, fn: Any, put: Any, like: Any) -> Any:
    """``run(trained) -> Run`` of ``fn(put(params, trained), *args)``; the gradient is that of ``trained``.

    It compiles in the background, for values like ``like``, so that two programs compile at once.
    """
    arrays, static = eqx.partition((model.params, model.args), eqx.is_array)

    @jax.jit
    def run(arrays: Any, trained: Any) -> Run:
        params, args = eqx.combine(arrays, static)

        def loss(trained: Any) -> Any:
            results = eqx.filter(fn(put(params, trained), *args), eqx.is_array)
            return loss_of(results), results

        grads, results = jax.grad(loss, has_aux=True)(trained) if model.differentiable else ({}, loss(trained)[1])
        return Run(results, grads)

    program = COMPILING.submit(run.lower(arrays, like).compile)
    return lambda trained: program.result()(arrays, trained)


def adapted(model: Model, adapters: Any, **options: Any) -> Any:
    """``run(adapters) -> Run`` of the adapted model, in which nothing is materialized but what the model says."""
    options = {"materialize": "allow" if model.materialized else "error"} | options
    return compiled(model, jlora.lora(model.fn, **options), jlora.attach, adapters)


def plain(model: Model) -> Any:
    """``run(weights) -> Run`` of the model itself, with other weights in place of those in its tables."""

    def put(params: Any, weights: Any) -> Any:
        leaves, treedef = jlora.named_leaves(params)
        return treedef.unflatten([weights.get(path, leaf) for path, leaf in leaves.items()])

    return compiled(model, model.fn, put, weights_of(model))


def merged_run(run: Any, model: Model, adapters: Any) -> Run:
    """The merged model's results and the adapters' gradients: a `plain` run at the merged weights, the chain rule."""
    weights = weights_of(model)
    results, grads = run({path: merged(weights[path], f) for path, f in adapters.items()})
    return Run(results, {path: pulled_back(g, weights[path], adapters[path]) for path, g in grads.items()})


def weights_of(model: Model) -> dict[str, Any]:
    """The weights in the model's tables."""
    leaves, _ = jlora.named_leaves(model.params)
    return {path: leaves[path] for path in (*model.axes, *model.tables)}


def numbers(x: Any) -> np.ndarray:
    """An array or key as numpy numbers that compare."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def assert_same(got: Any, expected: Any, tolerance: float = 0.0) -> None:
    """The same tree, shapes and dtypes; floats up to ``tolerance`` of their array's largest entry, the rest exactly."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        x, y = numbers(x), numbers(y)
        room = tolerance * np.abs(y).max(initial=0) if floating else 0
        np.testing.assert_allclose(x, y, rtol=0, atol=room, err_msg=jax.tree_util.keystr(path))


def assert_laws(got: Run, expected: Run, tolerance: float) -> None:
    """The adapted run is the merged one, in results and gradients, and every factor has a gradient."""
    assert_same(got.results, expected.results, tolerance)
    assert_same(got.grads, expected.grads, tolerance)
    for path, grad in jax.tree_util.tree_leaves_with_path(got.grads):
        assert np.any(numbers(grad) != 0), jax.tree_util.keystr(path)


def tolerance_of(name: str) -> float:
    return 2e-2 if "bfloat16" in name else 2e-5


@every_model
def test_trace_finds_the_axes_that_a_person_finds(name: str) -> None:
    """Axes are those of the model's tables; no bias, norm or statistic is taken for a matrix."""
    model, uses = MODELS[name](), uses_of(name)
    for kind, table in (("matmul", model.axes), ("lookup", model.tables)):
        assert {path: use.axes for path, use in uses.items() if use.kind == kind} == table
    assert not [path for path, use in uses.items() if use.kind in ("unread", "stopped")]


@every_model
def test_all_linear_takes_every_matmul_weight_and_nothing_else(name: str) -> None:
    """``all-linear`` is the weights of matmuls, convolutions and experts; tables are listed as left out."""
    model = MODELS[name]()
    if not model.axes:
        return
    plan = jlora.plan(model.params, jlora.LoraConfig(rank=2), uses_of(name))
    assert {path: target.axes for path, target in plan.items()} == model.axes
    assert set(plan.left_out) == set(model.tables)


@pytest.mark.sampled(14)
@every_model
def test_adapted_equals_merged(name: str) -> None:
    """Laws 1 and 2: fresh adapters change nothing; any adapters give the merged model's results and gradients."""
    model = MODELS[name]()
    adapters = random_like(shapes_of(name))
    ours, theirs = adapted(model, adapters), plain(model)
    fresh, base = ours(fresh_like(shapes_of(name), model.tables)), theirs(weights_of(model))
    assert_same(fresh.results, base.results, 1e-6)  # the last bits are XLA's: it rounds a matmul as it fuses it
    changed = ours(adapters)
    assert_laws(changed, merged_run(theirs, model, adapters), tolerance_of(name))
    pairs = zip(jax.tree.leaves(fresh.results), jax.tree.leaves(changed.results), strict=True)
    assert any(np.any(numbers(x) != numbers(y)) for x, y in pairs)


@pytest.mark.parametrize(
    "name",
    [
        "plain.mlp",
        "plain.tied_embedding",
        "plain.experts_ragged",
        "plain.bfloat16_compute",
        "convolutions.strided",
        "convolutions.depthwise",
        "convolutions.transposed_flipped",
        "linen.scanned",
        "nnx.scanned",
        "haiku.stacked",
        "equinox.mlp",
    ],
)
def test_fresh_adapters_change_no_bit(name: str) -> None:
    """Law 1 bit for bit, one operation at a time, where XLA has nothing to fuse."""
    model = MODELS[name]()
    adapters = fresh_like(shapes_of(name), model.tables)
    base = model.fn(model.params, *model.args)
    assert_same(jlora.lora(model.fn, materialize="error")(jlora.attach(model.params, adapters), *model.args), base)


@every_model
def test_explain_separates_factored_from_materialized(name: str) -> None:
    """`explain` lists every adapted weight, and which of them are materialized: those without a factored form."""
    model = MODELS[name]()
    explained = jlora.explain(model.fn, jlora.attach(model.params, shapes_of(name)), *model.args)
    assert {path for event in explained.events for path in event.path.split(", ")} == {*model.axes, *model.tables}
    assert {event.path for event in explained.materialized} == set(model.materialized)
    for event in explained.materialized:
        assert re.search(model.materialized[event.path], event.why or ""), event


@pytest.mark.parametrize(
    "name",
    [
        "plain.custom_jvp",
        "plain.custom_vjp",
        "plain.masked",
        "plain.chosen",
        "convolutions.batch_groups",
    ],
)
def test_a_weight_that_must_be_whole_is_named(name: str) -> None:
    """What has no factored form is an error under ``"error"`` and by default a warning; both name the weight."""
    model = MODELS[name]()
    arrays, static = eqx.partition((model.params, model.args, random_like(shapes_of(name))), eqx.is_array)

    def call(arrays: Any, **options: Any) -> Any:
        params, args, adapters = eqx.combine(arrays, static)
        return eqx.filter(jlora.lora(model.fn, **options)(jlora.attach(params, adapters), *args), eqx.is_array)

    paths = [re.escape(repr(path)) for path in model.materialized]
    with pytest.raises(jlora.MaterializeError, match="|".join(paths)):
        jax.eval_shape(functools.partial(call, materialize="error"), arrays)
    with pytest.warns(jlora.MaterializeWarning) as caught:
        jax.eval_shape(call, arrays)
    assert all(any(re.search(path, str(warning.message)) for warning in caught) for path in paths)


@pytest.mark.parametrize("name", ["plain.custom_jvp", "plain.custom_vjp"])
def test_custom_rules_are_looked_into_on_request(name: str) -> None:
    """With ``inline_custom_rules`` nothing is materialized; results are the same, and the gradient is the primal's."""
    model = MODELS[name]()
    adapters = random_like(shapes_of(name))
    inlined, theirs = adapted(model, adapters, materialize="error", inline_custom_rules=True), plain(model)
    got, expected = inlined(adapters), merged_run(theirs, model, adapters)
    assert_same(got.results, expected.results, 2e-5)
    doubled = jax.tree.map(lambda g: 2 * g, got.grads)  # the zoo's rules double the gradient
    assert_same(doubled, expected.grads, 2e-5)


def test_a_rule_that_is_the_functions_own_derivative_is_replaced_by_it() -> None:
    """A function that says so by a name stays factored, and has JAX's derivative."""

    @jax.custom_jvp
    def squares(x: Any, w: Any) -> Any:
        return (checkpoint_name(x, OWN_DERIVATIVE) @ w) ** 2

    squares.defjvps(lambda dx, y, x, w: 1 / 0, lambda dw, y, x, w: 2 * (x @ w) * (x @ dw))
    keys = jax.random.split(jax.random.key(0), 2)
    params, x = {"w": jax.random.normal(keys[0], (4, 3))}, jax.random.normal(keys[1], (5, 4))

    def fn(params: Any, x: Any) -> Any:
        return squares(x, params["w"])

    uses = jlora.trace(fn, params, x)
    assert not any(use.summed for use in uses["w"].uses)
    adapters = jax.tree.map(lambda a: a + 0.1, jlora.init(keys[0], params, jlora.LoraConfig(rank=2), uses))
    adapted_fn = jlora.lora(fn, materialize="error")
    found = jax.grad(lambda a: adapted_fn(jlora.attach(params, a), x).sum())(adapters)
    expected = jax.grad(lambda a: ((x @ jlora.merge(params, a)["w"]) ** 2).sum())(adapters)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "plain.attention_heads",
        "plain.tied_embedding",
        "plain.split_and_joined",
        "plain.experts_ragged",
        "plain.indexed_in_a_loop",
        "convolutions.grouped",
        "linen.mlp",
        "nnx.scan_of_remat",
        "haiku.mlp",
        "equinox.mlp",
    ],
)
def test_dora_equals_its_merged_model(name: str) -> None:
    """Law 2 for DoRA: the columns' magnitudes act on the result, and train, as they do in the merged weight."""
    model = MODELS[name]()
    adapters = random_like(shapes_of(name, use_dora=True))
    ours, theirs = adapted(model, adapters), plain(model)
    assert_laws(ours(adapters), merged_run(theirs, model, adapters), tolerance_of(name))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["plain.attention_heads", "plain.experts_einsum", "plain.tied_embedding"])
def test_merge_is_the_sum_written_out(name: str, use_dora: bool) -> None:
    """`jlora.merge` gives the weights against which the laws above check the adapted models."""
    model = MODELS[name]()
    adapters = random_like(shapes_of(name, use_dora=use_dora))
    expected = {path: merged(weight, adapters[path]) for path, weight in weights_of(model).items()}
    assert_same(jax.jit(jlora.merge)(model.params, adapters), expected, 1e-6)


def cast(model: Model, dtype: Any) -> Model:
    """The model with its floating parameters and arguments in another dtype."""
    to = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x  # noqa: E731
    return dataclasses.replace(model, params=jax.tree.map(to, model.params), args=jax.tree.map(to, model.args))


@pytest.mark.parametrize("name", ["plain.experts_ragged", "convolutions.nchw", "linen.mlp"])
def test_bfloat16_models_are_as_near_to_the_truth_as_merged_ones(name: str) -> None:
    """In bfloat16, the adapted model is hardly further from the float32 result than the merged one."""
    half = cast(MODELS[name](), jnp.bfloat16)
    whole = cast(half, jnp.float32)
    ours, theirs, exact = adapted(half, random_like(shapes_of(name))), plain(half), plain(whole)
    errors = []
    for seed in range(8):
        adapters = random_like(shapes_of(name), seed)
        runs = ours(adapters), merged_run(theirs, half, adapters), merged_run(exact, whole, adapters)
        for got, other, true in zip(*map(jax.tree.leaves, runs), strict=True):
            size = np.linalg.norm(numbers(true))
            errors.append(tuple(float(np.linalg.norm(numbers(x) - numbers(true)) / size) for x in (got, other)))
    ours_error, theirs_error = np.median(errors, axis=0)
    assert 0 < ours_error < 1.5 * theirs_error < 2e-2


@pytest.mark.parametrize("library", ["linen", "nnx", "haiku", "equinox"])
def test_every_scanned_layer_drops_entries_of_its_own(library: str) -> None:
    """With the identity for adapters on a zero base, each layer returns its dropped input: rate and masks show."""
    model, rate = MODELS[f"{library}.keys_of_every_layer"](), 0.25
    ((path, axes),) = model.axes.items()
    identity = jnp.broadcast_to(jnp.eye(6), (3, 6, 6))
    factors = {path: jlora.LoraFactors(identity, identity, axes=axes, dropout=rate)}
    params = jax.tree.map(jnp.zeros_like, model.params)

    @jax.jit
    def layers(key: Any) -> Any:
        tree = jlora.attach(params, factors, dropout_key=key)
        results = jlora.lora(model.fn, materialize="error")(tree, *model.args[:-1], jnp.ones((64, 6)))
        (out,) = (x for x in jax.tree.leaves(results) if x.shape == (3, 64, 6))
        return out

    dropped, others = (np.asarray(layers(jax.random.key(seed))) for seed in (0, 1))
    assert np.all((dropped == 0) | np.isclose(dropped, 1 / (1 - rate)))
    assert np.abs(np.mean(dropped == 0, (1, 2)) - rate).max() < 0.06
    assert all(np.any(dropped[i] != dropped[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert np.any(dropped != others)


def test_every_row_of_ragged_experts_drops_entries_of_its_own() -> None:
    """Dropout acts on the rows routed to an expert, each with a mask of its own."""
    identity, rate = jnp.broadcast_to(jnp.eye(6), (3, 6, 6)), 0.25
    factors = {"w": jlora.LoraFactors(identity, identity, axes=jlora.Axes((0,), (1,), (2,)), dropout=rate)}
    tree = jlora.attach({"w": jnp.zeros((3, 6, 6))}, factors, dropout_key=jax.random.key(0))
    experts = jlora.lora(lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes), materialize="error")
    dropped = np.asarray(experts(tree, jnp.ones((64, 6)), jnp.array([20, 0, 44])))
    assert np.all((dropped == 0) | np.isclose(dropped, 1 / (1 - rate)))
    assert abs(np.mean(dropped == 0) - rate) < 0.06
    assert len(np.unique(dropped, axis=0)) > 20


def test_remat_draws_the_same_dropout_again() -> None:
    """Rematerialisation changes nothing, dropout included: the backward pass drops what the forward pass dropped."""
    both = {}
    for name in ("linen.scanned", "linen.scan_of_remat"):
        model = MODELS[name]()
        adapters = {p: dataclasses.replace(f, dropout=0.5) for p, f in random_like(shapes_of(name)).items()}

        @jax.jit
        def grads(adapters: Any, model: Model = model) -> Any:
            tree = functools.partial(jlora.attach, model.params, dropout_key=jax.random.key(0))
            return jax.grad(lambda a: loss_of(jlora.lora(model.fn)(tree(a), *model.args)))(adapters)

        both[name] = grads(adapters)
    assert_same(both["linen.scan_of_remat"], both["linen.scanned"], 2e-5)
