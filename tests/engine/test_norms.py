"""Weights that are normalized or centred: their norm and mean are those of `W + ab`, and no full-size array is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from benchmarks import standardized_weights
from tests.engine.test_laws import MOVES, TOLERANCE
from tests.engine.test_trace import BENDS
from tests.messages import expect
from tests.toys import adapted_loss, adapters_for, assert_law, loss_of, merged_loss, normal, stack, unstack

Way = Callable[[Any], Any]
still = lax.stop_gradient


def over(*axes: int) -> dict[str, Way]:
    """What is done to a weight by its mean and norms over ``axes``."""

    def less_mean(w: Any) -> Any:
        return w - jnp.mean(w, axes, keepdims=True)

    return {
        "standardized": lambda w: less_mean(w) / (jnp.std(w, axes, keepdims=True) + 1e-3),
        "by the variance": lambda w: less_mean(w) * lax.rsqrt(jnp.var(w, axes, keepdims=True) + 1e-5),
        "by jax.nn": lambda w: jax.nn.standardize(w, axes, epsilon=1e-3),
        "unit norm": lambda w: w * lax.rsqrt(jnp.sum(w**2, axes, keepdims=True)),
        "by its product": lambda w: w / jnp.sqrt(jnp.sum(w * w, axes, keepdims=True)),
        "less its mean": less_mean,
        "twice": lambda w: less_mean(w / jnp.sqrt(jnp.sum(w**2, axes, keepdims=True))),
        "jitted": lambda w: w / jax.jit(lambda w: jnp.sqrt(jnp.sum(jnp.square(w), axes, keepdims=True)))(w),
        "a constant norm": lambda w: w / still(jnp.sqrt(jnp.sum(w**2, axes, keepdims=True))),
        "by its mean": lambda w: w * (2 + jnp.mean(w, axes, keepdims=True)),
    }


ALONG = {"inputs": over(-2), "outputs": over(-1), "both": over(-2, -1)}
WAYS = {f"{name}, {where}": way for where, ways in ALONG.items() for name, way in ways.items()}


def kept_factored(fn: Any, adapters: Any, params: Any, *args: Any) -> None:
    """The adapted model is the merged one, in its gradients too, and nothing is summed, by its own account and the
    plan's."""
    assert not jlora.explain(fn, jlora.attach(params, adapters), *args).materialized
    assert not any(use.materialized for use in jlora.trace(fn, params, *args).values())
    runs = [jax.jit(jax.value_and_grad(loss(fn))) for loss in (adapted_loss, merged_loss)]
    for got, want in zip(*(jax.tree.leaves(run(adapters, params, *args)) for run in runs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * (1 + np.abs(want).max()))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", sorted(WAYS))
def test_a_normalized_weight_is_the_merged_one(name: str) -> None:
    """Law 2, through the norm: matrices used straight and transposed, a stack of them, and a scanned one."""

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ WAYS[name](params["up"]))
        h = lax.scan(lambda h, w: (jnp.tanh(h @ WAYS[name](w)), None), h, params["layers"])[0]
        each = jnp.einsum("lbo,lio->lbi", jnp.stack([h, 2 * h]), WAYS[name](params["layers"]))
        return h @ WAYS[name](params["up"]).T, each

    params, x = {"up": normal(0, 5, 6), "layers": normal(1, 2, 6, 6)}, normal(2, 3, 5)
    kept_factored(fn, adapters_for(fn, params, x), params, x)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(over()))
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_normalized_kernel_is_the_merged_one(name: str, use_dora: bool) -> None:
    """Convolutions of standardized kernels, with groups and without; DoRA is the weight that is standardized."""
    norm = over(0, 1, 2)[name]
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(params: Any, x: Any) -> Any:
        h = lax.conv_general_dilated(x, norm(params["k"]), (1, 1), "SAME", dimension_numbers=numbers)
        return lax.conv_general_dilated(
            jnp.tanh(h), norm(params["l"]), (2, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    params, x = {"k": normal(0, 3, 3, 4, 6), "l": normal(1, 3, 2, 3, 4)}, normal(2, 2, 6, 6, 4)
    kept_factored(fn, adapters_for(fn, params, x, use_dora=use_dora), params, x)


CHAINS = MOVES | BENDS | {name: WAYS[name] for name in WAYS if "both" not in name}
SMOOTH = sorted(CHAINS.keys() - {"complex", "inverted", "rounded", "permuted"})


@st.composite
def chains(draw: st.DrawFn) -> Callable[..., Any]:
    """A model of a stacked weight, with norms between moves, scales, sums and choices."""
    norms = draw(st.lists(st.sampled_from(sorted(WAYS)), min_size=1, max_size=2))
    steps = draw(st.permutations([*norms, *draw(st.lists(st.sampled_from(SMOOTH), max_size=3))]))

    def fn(params: Any, x: Any) -> Any:
        w = params["w"]
        for step in steps:
            w = (CHAINS | WAYS)[step](w)
        return x @ w[0], jnp.einsum("bi,lio->lbo", x, w)

    return fn


@hypothesis.settings(max_examples=80)
@hypothesis.given(chains())
def test_the_plan_says_what_stays_factored(fn: Callable[..., Any]) -> None:
    """`trace` and `lora` agree, whatever else is done to the weight."""
    params, x = {"w": jax.ShapeDtypeStruct((2, 6, 4), "float32")}, jax.ShapeDtypeStruct((3, 6), "float32")
    use = jlora.trace(fn, params, x)["w"]
    batch, inputs, outputs = use.axes.sizes((2, 6, 4)) if use.axes else ((2,), (6,), (4,))
    axes = use.axes or jlora.Axes((0,), (1,), (2,))
    factors = jlora.LoraFactors(jnp.ones((*batch, *inputs, 2)), jnp.ones((*batch, 2, *outputs)), axes=axes)
    told = jlora.explain(fn, jlora.attach(params, {"w": factors}), x)
    assert bool(told.materialized) == bool(use.materialized), (told.materialized, use)


@pytest.mark.slow
@hypothesis.settings(max_examples=15)
@hypothesis.given(chains(), st.booleans())
def test_whatever_else_is_done_to_it(fn: Callable[..., Any], use_dora: bool) -> None:
    """Factored or not, gradients are the merged model's."""

    def loss(adapters: Any, run: Any) -> Any:
        return loss_of(run(adapters))

    params, x = {"w": normal(0, 2, 6, 4)}, normal(1, 3, 6)
    hypothesis.assume(jlora.trace(fn, params, x)["w"].kind in ("matmul", "lookup"))
    adapters = adapters_for(fn, params, x, targets=("^w$",), use_dora=use_dora)
    apply = jlora.lora(fn, materialize="allow")
    ours = jax.grad(loss)(adapters, lambda a: apply(jlora.attach(params, a), x))
    merged = jax.grad(loss)(adapters, lambda a: fn(jlora.merge(params, a), x))
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * (1 + np.abs(want).max()))


REFUSED: dict[str, tuple[str, Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "wav2vec 2.0's positions: a norm for each tap": (
        "follows the axes that are summed",
        lambda k, x: lax.conv_general_dilated(
            x,
            k / jnp.linalg.norm(k, axis=(0, 1), keepdims=True),
            (1,),
            "SAME",
            dimension_numbers=("NCH", "OIH", "NCH"),
            feature_group_count=2,
        ),
        (6, 2, 3),
    ),
    "a norm of single taps": (
        "inputs and outputs at once",
        lambda k, x: lax.conv_general_dilated(
            x, k / jnp.sqrt(jnp.sum(k**2, 2, keepdims=True)), (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
        ),
        (6, 4, 3),
    ),
    "its square alone": (
        "squared elementwise",
        lambda k, x: jnp.einsum("nch,oc->no", x, k) + jnp.einsum("nch,oc->no", x, k**2),
        (6, 4),
    ),
    "a stack that is not a batch of the other operand": (
        "summed and kept dimensions at once",
        lambda k, x: (
            jnp.einsum(
                "lno,lco->lnc",
                jnp.einsum(
                    "lnc,lco->lno", jnp.stack([x[..., 0], x[..., 1]]), k := k / jnp.linalg.norm(k, axis=1)[:, None]
                ),
                k,
            )
            + jnp.einsum("no,lco->lnc", x[:, :3, 0], k)
        ),
        (2, 4, 3),
    ),
    "beside what is plain": (
        "on weights that are joined",
        lambda k, x: jnp.einsum("nch,oc->noh", x, k / jnp.linalg.norm(k, axis=1, keepdims=True) + jnp.eye(6, 4)),
        (6, 4),
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_is_summed_with_one_warning(name: str) -> None:
    """The plan says so, the one warning names weight, place and reason, and results are the merged model's."""
    why, use, shape = REFUSED[name]
    fn = lambda p, x: use(p["k"], x)  # noqa: E731
    params, x = {"k": normal(0, *shape)}, normal(1, 2, 4, 5)
    (used,) = jlora.trace(fn, params, x).values()
    assert any(why in use.note for use in used.materialized)
    adapters = adapters_for(fn, params, x)
    with pytest.warns(jlora.MaterializeWarning) as caught:
        ours = jlora.lora(fn)(jlora.attach(params, adapters), x)
    (warning,) = caught
    expect(str(warning.message), f"'k' of shape {shape}", "test_norms.py", why)
    np.testing.assert_allclose(ours, fn(jlora.merge(params, adapters), x), 1e-5, 1e-5)


def test_looked_up_rows_of_unit_norm() -> None:
    """Those out of bounds too, which have the fill value."""
    fn = lambda p, ids: jnp.take(  # noqa: E731
        p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True), ids, axis=0, mode="fill", fill_value=3.0
    )
    params, ids = {"w": normal(0, 7, 5)}, jnp.array([[0, 6], [9, 3]])
    adapters = adapters_for(fn, params, ids)
    kept_factored(fn, adapters, params, ids)
    assert (fn(params, ids)[1, 0] == 3).all()
    assert (jlora.lora(fn)(jlora.attach(params, adapters), ids)[1, 0] == 3).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_norm_of_a_narrow_weight_is_that_of_float32(dtype: str) -> None:
    norm = over(0)["standardized"]
    params = {"w": normal(0, 16, 8).astype(dtype)}
    x = normal(1, 3, 16).astype(dtype)
    fn = lambda p, x: x @ norm(p["w"].astype(x.dtype))  # noqa: E731
    adapters = adapters_for(fn, params, x)
    exact = fn(jlora.merge({"w": params["w"].astype(jnp.float32)}, adapters), x.astype(jnp.float32))
    ours = jlora.lora(fn, materialize="error")(jlora.attach(params, adapters), x)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, 0, TOLERANCE[dtype] * np.abs(exact).max())


def test_dropout_acts_before_the_norm() -> None:
    """The norm is that of the whole weight; entries are dropped from the adapter's input, as without a norm."""
    plain = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(0, 5, 4)}, normal(1, 3, 5)
    adapters = adapters_for(plain, params, x, dropout=0.5)
    tree = jlora.attach(params, adapters, dropout_key=jax.random.key(3))
    norm = jnp.linalg.norm(jlora.merge(params, adapters)["w"], axis=0)
    for name in ("unit norm", "by its product", "jitted"):
        ours = jlora.lora(lambda p, x, n=name: plain({"w": over(0)[n](p["w"])}, x), materialize="error")(tree, x)
        np.testing.assert_allclose(ours, jlora.lora(plain)(tree, x) / norm, 1e-5, 1e-6)
    centred = jlora.lora(lambda p, x: plain({"w": over(0)["less its mean"](p["w"])}, x), materialize="error")(tree, x)
    assert np.abs(centred - jlora.lora(plain)(tree, x)).max() > 1e-3


def test_many_adapters_at_once() -> None:
    """`jax.vmap` over adapters, recomputed in the backward pass, is each of them by itself."""
    norm = over(0)["standardized"]
    fn = jax.checkpoint(lambda p, x: jnp.tanh(x @ norm(p["w"])) @ norm(p["v"]))
    params, x = {"w": normal(0, 5, 6), "v": normal(1, 6, 4)}, normal(2, 3, 5)
    many = stack(adapters_for(fn, params, x), 3)
    run = lambda a: jlora.lora(fn, materialize="error")(jlora.attach(params, a), x)  # noqa: E731
    grads = jax.vmap(jax.grad(lambda a: loss_of(run(a))))(many)
    for one, grad in zip(unstack(many, 3), unstack(grads, 3), strict=True):
        want = jax.grad(lambda a: loss_of(fn(jlora.merge(params, a), x)))(one)
        chex.assert_trees_all_close(grad, want, rtol=1e-4, atol=2e-5)


def test_a_multiplier_that_is_trained_whole_has_its_gradient() -> None:
    """Weight norm with the norms trained beside the direction, one of them from zero."""
    fn = lambda p, x: x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))  # noqa: E731
    params, x = {"w": normal(0, 5, 4), "g": normal(1, 4).at[2].set(0.0)}, normal(2, 3, 5)
    adapters = adapters_for(fn, params, x, targets=("^w$",), train_also=("^g$",))
    adapters = {**adapters, "g": adapters["g"].at[2].set(0.0)}
    assert_law(fn, adapters, params, x)


MEMORY = {"dense, few tokens": 0.6, "dense, many tokens": 1.0, "convolution": 1.25, "convolution, many positions": 1.0}
"""What the factored form may keep, by what the materialized one keeps."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", sorted(standardized_weights.SMALL))
def test_what_the_factored_form_saves(name: str) -> None:
    """Why the factored form is used: its FLOPs and memory in a step, against summing the weight in each step."""
    programs = standardized_weights.compile_programs(standardized_weights.SMALL[name])
    factored, materialized = programs["jlora"], programs["materialized"]
    assert factored.flops < 0.8 * materialized.flops
    assert factored.temporary_memory < MEMORY[name] * materialized.temporary_memory
