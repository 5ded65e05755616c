"""The laws of `decompose`, over drawn uses of a weight: the model stays, in every layout and dtype."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jlora
from tests.engine.test_laws import (
    MODES,
    Case,
    Mode,
    close,
    conv_cases,
    dot_cases,
    experts_case,
    moved_cases,
    randomized,
)
from tests.toys import TOYS, normal

CONFIG = jlora.LoraConfig(rank=1, alpha=3.0, targets=("w",), exclude=())
CONFIGS = {
    "plain": CONFIG,
    "rslora": dataclasses.replace(CONFIG, rank=2, use_rslora=True),
    "dora": dataclasses.replace(CONFIG, use_dora=True),
}


def coarse(w: Any) -> Any:
    """A quantizer with steps of a quarter."""
    return jnp.round(4 * w) / 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coarse:
    """A quantized leaf, as an object."""

    steps: Any

    def dequantize(self) -> Any:
        return self.steps.astype(jnp.float32) / 4

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps.shape


def coarse_object(w: Any) -> Coarse:
    return Coarse(jnp.round(4 * w).astype(jnp.int8))


METHODS: dict[str, dict[str, Any]] = {
    "pissa": {},
    "randomized pissa": {"niter": 2, "key": jax.random.key(1)},
    "olora": {},
    "loftq": {"quantizer": coarse, "iterations": 2},
    "lq": {"quantizer": coarse, "iterations": 2},
    "corda": {},
    "corda_kpm": {},
    "eva": {"rho": 1.0},
    "lora_ga": {},
}
matmuls = st.one_of(
    dot_cases(), dot_cases(), conv_cases(), moved_cases(),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(experts_case),
)  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@hypothesis.settings(max_examples=5)
@hypothesis.given(matmuls, st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(CONFIGS)))
def test_the_adapted_residual_is_the_model(mode: Mode, case: Case, method: str, config: str) -> None:
    """The residual with its adapters computes what the params do, up to a quantization; it keeps their dtype and
    memory; trained adapters of it are, as plain ones, adapters of the params."""
    with jax.numpy_dtype_promotion(mode.promotion):
        check_laws(mode, case, method, dataclasses.replace(CONFIGS[config], dtype=mode.factors))


def check_laws(mode: Mode, case: Case, method: str, config: jlora.LoraConfig) -> None:
    def fn(params: Any, x: Any) -> Any:
        w = jax.device_put(params["w"], jax.memory.Space.Device) if mode.offloaded else params["w"]
        return case.use(w.astype(mode.x), x)

    shapes = {"w": jax.ShapeDtypeStruct(case.w, mode.base)}, jax.ShapeDtypeStruct(case.x, mode.x)
    uses = jlora.trace(fn, *shapes)
    _, inputs, outputs = (math.prod(sizes) for sizes in case.axes.sizes(case.w))
    hypothesis.assume(config.rank * (2 if method == "lora_ga" else 1) <= min(inputs, outputs))
    plan = jlora.plan(shapes[0], config, uses)
    apply = jlora.lora(fn, materialize="allow")
    quantized, exact = method in ("loftq", "lq"), method not in ("loftq", "lq", "eva")

    @jax.jit
    def everything(key: Any) -> Any:
        w = lax.optimization_barrier((jax.random.normal(key, case.w) / 2).astype(mode.base))
        params = {"w": jax.device_put(w, jax.memory.Space.Host) if mode.offloaded else w}
        x = jax.random.normal(jax.random.fold_in(key, 1), case.x, mode.x)
        options = dict(METHODS[method])
        if method in ("corda", "corda_kpm", "eva"):
            options["moments"] = jlora.input_moments(fn, params, plan, x)
        if method == "lora_ga":
            options["gradients"] = {"w": jax.random.normal(jax.random.fold_in(key, 2), case.w)}
        name: Any = method.removeprefix("randomized ")
        adapters: Any
        residual, adapters = lax.optimization_barrier(jlora.decompose(params, plan, method=name, **options))
        trained = lax.optimization_barrier(randomized(key, adapters))
        assert jax.typeof(residual["w"]) == jax.typeof(params["w"])
        wide = {"w": w.astype(jnp.float32)}
        rest = {"w": jax.device_put(residual["w"], jax.memory.Space.Device).astype(jnp.float32)}
        plain: Any = jlora.to_plain(params, residual, trained) if exact else adapters
        return {
            "outputs": (apply(jlora.attach(residual, adapters), x), fn(params, x)),
            "weights": (jlora.merge(rest, adapters), wide),
            "plain": (jlora.merge(wide, plain), jlora.merge(rest, trained if exact else adapters)),
            "errors": (jlora.merge(rest, adapters)["w"] - wide["w"], coarse(wide["w"]).astype(mode.base) - w),
            "ranks": (plain["w"].rank, adapters["w"].rank),
        }

    found = everything(jax.random.key(math.prod(case.w) + math.prod(case.x)))
    if quantized:
        errors = [float(jnp.linalg.norm(e.astype(jnp.float32).ravel())) for e in found["errors"]]
        narrow = mode.factors if mode.factors != "float32" else mode.base
        assert errors[0] <= errors[1] + (1e-5 if narrow == "float32" else 3e-2) or method == "loftq"
        return
    rounded = max(mode.base, mode.x, mode.factors, key=lambda d: jnp.finfo(d).eps)
    for name in ("outputs", "weights", "plain"):
        got, want = found[name]
        close(got, want, rounded)
    if exact:
        assert found["ranks"][0] == 2 * found["ranks"][1]


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.one_of(dot_cases(), st.lists(st.integers(1, 3), min_size=1, max_size=3).map(experts_case)))
def test_moments_are_those_of_the_inputs(case: Case) -> None:
    """For y = x·W, the sum of y is the total times W, and the sum of y² is W's quadratic form in the second moment."""
    key = jax.random.key(0)
    params, x = {"w": jax.random.normal(key, case.w)}, jax.random.normal(jax.random.fold_in(key, 1), case.x)
    fn = lambda params, x: case.use(params["w"], x)  # noqa: E731
    plan = jlora.plan(params, CONFIG, jlora.trace(fn, params, x))
    batch, inputs, outputs = case.axes.sizes(case.w)
    w = params["w"].transpose(sum(case.axes, ())).reshape(*batch, math.prod(inputs), math.prod(outputs))
    y, found = fn(params, x), jlora.input_moments(fn, params, plan, x)["w"]
    np.testing.assert_allclose(jnp.einsum("...i,...io->", found.total, w), jnp.sum(y), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jnp.einsum("...io,...ij,...jo->", w, found.square, w), jnp.sum(y**2), rtol=1e-4)
    assert float(found.count.sum()) * math.prod(outputs) == y.size


PROGRAMS: dict[str, Any] = {
    "itself": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda fn: jax.vmap(fn, (None, 0)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("toy", ["mlp", "stacked", "experts"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_moments_pass_through_transformations(program: str, toy: str) -> None:
    """Scanned layers and experts have moments of their own, and those of batches add up."""
    fn, params, x = TOYS[toy]
    plan = jlora.plan(params, jlora.LoraConfig(rank=2), jlora.trace(fn, params, x))
    run = lambda params, x: PROGRAMS[program](fn)(params, x[:, None])  # noqa: E731
    whole = jlora.input_moments(fn, params, plan, x)
    parts = [jlora.input_moments(run, params, plan, part) for part in (x[:6], x[6:])]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-4, atol=1e-4)
    first = "w0" if toy == "mlp" else "up"
    slices = whole[first].square[0] if toy == "stacked" else whole[first].square
    np.testing.assert_allclose(slices, x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["loftq", "lq"])
def test_the_residual_may_be_a_quantized_object(method: Any) -> None:
    """What the quantizer returns is the leaf; its dequantized value and the factors are those of plain arrays."""
    params = {"w": normal(0, 3, 8, 12), "bias": jnp.ones(3)}
    config = jlora.LoraConfig(rank=2, targets=("w",))
    uses = jlora.trace(lambda p, x: jnp.einsum("bi,lio->lbo", x, p["w"]), params, jnp.ones((2, 8)))
    found, adapters = jlora.decompose(params, config, uses, method=method, quantizer=coarse_object)
    plain, same = jlora.decompose(params, config, uses, method=method, quantizer=coarse)
    assert isinstance(found["w"], Coarse)
    np.testing.assert_array_equal(found["w"].dequantize(), plain["w"])
    chex.assert_trees_all_close(adapters, same)
    error = jnp.linalg.norm(jlora.merge(plain, same)["w"] - params["w"])
    assert error < jnp.linalg.norm(coarse(params["w"]) - params["w"])
    with pytest.raises(ValueError, match="'w'[\\s\\S]*without a quantization"):
        jlora.to_plain(params, found, adapters)


def test_lq_is_never_worse_than_quantization_whatever_the_quantizer() -> None:
    """Also with one for which later rounds get worse."""
    params = {"w": normal(0, 16, 16)}
    for levels in (1, 2, 7):
        quantizer = lambda w, n=levels: jnp.round(w / jnp.abs(w).max() * n) * jnp.abs(w).max() / n  # noqa: E731
        config = jlora.LoraConfig(rank=4, targets=("w",))
        errors = {}
        for method in ("loftq", "lq"):
            rest, adapters = jlora.decompose(params, config, method=method, quantizer=quantizer, iterations=8)  # pyright: ignore[reportArgumentType]
            errors[method] = float(jnp.linalg.norm(jlora.merge(rest, adapters)["w"] - params["w"]))
        once, first = jlora.decompose(params, config, method="loftq", quantizer=quantizer, iterations=1)
        assert errors["lq"] <= float(jnp.linalg.norm(jlora.merge(once, first)["w"] - params["w"])) + 1e-6
        assert errors["lq"] < float(jnp.linalg.norm(quantizer(params["w"]) - params["w"]))


def test_the_first_step_of_lora_ga_is_that_of_full_training() -> None:
    """A gradient step on the factors moves the weight along the gradient's singular vectors (Wang et al. 2024, thm
    3.1): its update has a larger cosine with the gradient than that of PiSSA and of random factors."""
    params, x = {"w": normal(0, 24, 20)}, normal(1, 64, 24)
    config = jlora.LoraConfig(rank=4, targets=("w",), use_rslora=True)
    loss = lambda tree: jnp.mean((jlora.lora(lambda p, x: x @ p["w"])(tree, x) - jnp.sin(x @ normal(2, 24, 20))) ** 2)  # noqa: E731
    gradients = jax.grad(lambda w: loss(jlora.attach(params, {"w": w})))(params["w"])

    def cosine(residual: Any, adapters: Any) -> float:
        step = jax.grad(lambda a: loss(jlora.attach(residual, a)))(adapters)
        moved = jax.tree.map(lambda a, g: a - 1e-3 * g, adapters, step)
        change = jlora.merge(residual, moved)["w"] - jlora.merge(residual, adapters)["w"]
        return float(-jnp.vdot(change, gradients) / jnp.linalg.norm(change) / jnp.linalg.norm(gradients))

    found = {
        "lora_ga": cosine(*jlora.decompose(params, config, method="lora_ga", gradients={"w": gradients})),
        "pissa": cosine(*jlora.decompose(params, config, method="pissa")),
        "random": cosine(params, jlora.init(jax.random.key(0), params, config)),
    }
    assert found["lora_ga"] > max(found["pissa"], found["random"])


def test_randomized_pissa_is_near_the_exact_one() -> None:
    """Within 2% of the best error, and the same for the same key."""
    params = {"w": normal(0, 120, 80) @ jnp.diag(0.9 ** jnp.arange(80.0))}
    config, key = jlora.LoraConfig(rank=8, targets=("w",)), jax.random.key(3)
    exact = jlora.decompose(params, config, method="pissa")[0]["w"]
    one, again = (jlora.decompose(params, config, method="pissa", niter=2, key=key)[0]["w"] for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.linalg.norm(one)) < 1.02 * float(jnp.linalg.norm(exact))


def test_other_leaves_are_shared_and_whole_ones_copied() -> None:
    """In any tree: `train_also` leaves are copies, all others the same arrays; a module stays a module."""

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.up, self.head = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.up(x))

    model, x = Model(), jnp.ones((2, 4))
    graph, params = nnx.split(model)
    fn = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    config = jlora.LoraConfig(rank=2, train_also=("head",))
    uses = jlora.trace(fn, params, x)
    residual, adapters = jlora.decompose(params, config, uses, method="pissa")
    assert jax.tree.structure(residual) == jax.tree.structure(params)
    theirs, ours = jlora.named_leaves(params)[0], jlora.named_leaves(residual)[0]
    assert {p for p in theirs if theirs[p] is not ours[p]} == {"up/kernel"}
    assert adapters["head/kernel"] is not theirs["head/kernel"]
    np.testing.assert_allclose(jlora.lora(fn)(jlora.attach(residual, adapters), x), fn(params, x), atol=1e-5)
    plain = jlora.to_plain(params, residual, adapters)
    assert plain["head/kernel"] is adapters["head/kernel"]


PARAMS = {"w": normal(0, 6, 4), "table": normal(1, 9, 6)}


def reads(params: Any, ids: Any) -> Any:
    return params["table"][ids] @ params["w"]


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"method": "pisa"}, TypeError, r"'pisa'.*'pissa'"),
        ({"method": "pissa", "rho": 2.0}, TypeError, "takes no rho"),
        ({"method": "pissa", "niter": 2}, TypeError, "niter and key"),
        ({"method": "loftq"}, TypeError, "needs quantizer"),
        ({"method": "corda"}, TypeError, "needs moments"),
        ({"method": "eva", "moments": {}}, ValueError, "'w' is missing in moments"),
        ({"method": "lora_ga", "gradients": {"w": jnp.ones((4, 6))}}, ValueError, r"\(4, 6\), expected \(6, 4\)"),
        ({"method": "loftq", "quantizer": lambda w: w[0]}, ValueError, r"'w' of shape \(6, 4\)"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], facts: str) -> None:
    with pytest.raises(error, match=facts):
        jlora.decompose(PARAMS, jlora.LoraConfig(rank=2, targets=("w",)), **options)


def test_what_has_no_decomposition_is_named() -> None:
    """Every weight at once: tables, and ranks above the weight's."""
    uses = jlora.trace(reads, PARAMS, jnp.arange(3))
    config = jlora.LoraConfig(rank=5, targets=("w", "table"))
    with pytest.warns(UserWarning, match="rank"), pytest.raises(ValueError) as error:
        jlora.decompose(PARAMS, config, uses, method="pissa")
    assert "'table' is a lookup table" in str(error.value) and "'w': rank 5, expected at most 4" in str(error.value)
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match="shapes"):
        jlora.decompose(shapes, jlora.LoraConfig(rank=2, targets=("w",)), method="pissa")


def test_weights_without_inputs_are_named() -> None:
    """A result without a gradient, and an expert without rows."""
    plan = jlora.plan(PARAMS, jlora.LoraConfig(rank=2, targets=("w",)), jlora.trace(reads, PARAMS, jnp.arange(3)))
    with pytest.raises(ValueError, match="'w'"):
        jlora.input_moments(lambda p, i: jnp.argmax(reads(p, i)), PARAMS, plan, jnp.arange(3))
    params = {"w": normal(0, 2, 4, 3)}
    fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0], jnp.int32))  # noqa: E731
    plan = jlora.plan(params, jlora.LoraConfig(rank=2, targets=("w",)), jlora.trace(fn, params, jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="'w'"):
        jlora.input_moments(fn, params, plan, jnp.ones((2, 4)))


def test_ranks_move_within_their_budget() -> None:
    """EVA's ranks sum to the plan's over all slices, none beyond rho times its own; without variance, none."""
    params = {"flat": normal(0, 16, 8), "steep": normal(1, 16, 8)}
    x = {"flat": normal(2, 64, 16), "steep": normal(3, 64, 16) * 0.3 ** jnp.arange(16)}
    fn = lambda p, x: (x["flat"] @ p["flat"], x["steep"] @ p["steep"])  # noqa: E731
    plan = jlora.plan(params, jlora.LoraConfig(rank=4), jlora.trace(fn, params, x))
    moments = jlora.input_moments(fn, params, plan, x)
    _, adapters = jlora.decompose(params, plan, method="eva", moments=moments, rho=1.5)
    ranks = {path: f.rank for path, f in adapters.items() if isinstance(f, jlora.LoraFactors)}
    assert sum(ranks.values()) == 8 and max(ranks.values()) <= 6 and ranks["flat"] != ranks["steep"]
    _, same = jlora.decompose(params, plan, method="eva", moments=moments, rho=1.0)
    assert {f.rank for f in same.values() if isinstance(f, jlora.LoraFactors)} == {4}
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda m: jlora.decompose(params, plan, method="eva", moments=m))(moments)
    with pytest.raises(ValueError, match="rho=0.5"):
        jlora.decompose(params, plan, method="eva", moments=moments, rho=0.5)
