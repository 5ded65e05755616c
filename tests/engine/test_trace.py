"""`trace` and `plan` against what `lora` does: what is planned stays factored, and what is left out says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import chex
import equinox as eqx
import haiku as hk
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jlora
from tests.engine.test_laws import MOVES, Case, cases
from tests.messages import expect, message
from tests.toys import adapters_for, assert_law, normal

still = lax.stop_gradient
RANK2 = jlora.LoraConfig(rank=2)


def planned(fn: Callable[..., Any], params: Any, *args: Any, **config: Any) -> jlora.Plan:
    """The plan of ``fn`` for every linear weight."""
    fields: dict[str, Any] = {"rank": 2, **config}
    return jlora.plan(params, jlora.LoraConfig(**fields), jlora.trace(fn, params, *args))


# ---- one table: what is planned is what has a factored form

BENDS: dict[str, Callable[[Any], Any]] = {
    "mask": lambda w: w * jnp.tri(w.shape[-2], w.shape[-1], dtype=w.dtype),
    "chosen": lambda w: jnp.where(jnp.tri(w.shape[-2], w.shape[-1], dtype=bool), w, 0),
    "half of the inputs": lambda w: jnp.where(jnp.arange(w.shape[-2])[:, None] < 3, w, 0),
    "repeated and thinned": lambda w: jnp.repeat(w, 2, axis=1)[:, ::2],
    "spread, merged, cut": lambda w: jnp.broadcast_to(w[:, :, None], (*w.shape[:2], 2, w.shape[2])).reshape(
        w.shape[0], -1, w.shape[2]
    )[:, ::2],
    "merged and split": lambda w: (w.reshape(w.shape[0], -1) * 2).reshape(w.shape),
    "padded where constant": lambda w: jnp.pad(w[None], ((1, 0), (0, 0), (0, 0), (0, 0)))[1],
    "padded outputs": lambda w: jnp.pad(w, ((0, 0), (0, 0), (1, 2)), constant_values=3.0)[..., :4],
    "beside a plain one": lambda w: jnp.concatenate([w[None], jnp.ones_like(w)[None] * 2])[0],
    "stacked with a plain one": lambda w: jnp.stack([jnp.full(w.shape, 2.0, w.dtype), w])[1],
    "squared": lambda w: w * w,
    "inverted": lambda w: 1 / w,
    "complex": lambda w: (w.astype("complex64") * 1j).imag,
    "rounded": lambda w: jnp.round(w),
    "permuted": lambda w: w[:, np.array([2, 0, 1, 5, 4, 3])],
    "its own rule": lambda w: jax.nn.relu(w),
    "branch": lambda w: lax.cond(jnp.array(True), lambda w: w, lambda w: w, w),
}


@st.composite
def bent_cases(draw: st.DrawFn) -> Case:
    """A chain of rearrangements, of which some have no factored form, then a matmul of every slice."""
    moves = MOVES | BENDS
    steps = draw(st.lists(st.sampled_from(sorted(moves)), min_size=1, max_size=3))

    def use(w: Any, x: Any) -> Any:
        for step in steps:
            w = moves[step](w)
        return [x @ w[0], jnp.einsum("bi,lio->lbo", x, w)]

    return Case(use, (2, 6, 4), (3, 6), jlora.Axes((0,), (1,), (2,)))


@hypothesis.settings(max_examples=80)
@hypothesis.given(st.one_of(cases, bent_cases(), bent_cases()))
def test_a_plan_says_what_stays_factored(case: Case) -> None:
    """A weight that "all-linear" takes is summed exactly where its uses say so; one that it does not take, and
    that is no lookup, could not be kept factored."""

    def fn(params: Any, x: Any) -> Any:
        return case.use(params["w"], x)

    params, x = {"w": jax.ShapeDtypeStruct(case.w, "float32")}, jax.ShapeDtypeStruct(case.x, "float32")
    use = jlora.trace(fn, params, x)["w"]
    axes = use.axes or case.axes
    batch, inputs, outputs = axes.sizes(case.w)
    factors = jlora.LoraFactors(jnp.ones((*batch, *inputs, 2)), jnp.ones((*batch, 2, *outputs)), axes=axes)
    told = jlora.explain(fn, jlora.attach(params, {"w": factors}), x)
    assert bool(told.materialized) == bool(use.materialized), (told.materialized, use)
    assert use.kind in ("matmul", "lookup") or told.materialized


FACTORED_NOW = [
    "half of the inputs",
    "repeated and thinned",
    "spread, merged, cut",
    "padded where constant",
    "padded outputs",
    "beside a plain one",
    "stacked with a plain one",
    "permuted",
]
NOT_WITH_DORA = ("half of the inputs", "padded where constant", "beside a plain one", "stacked with a plain one")
"""DoRA's multiplier would also scale the plain array there."""


@pytest.mark.parametrize(
    ("name", "use_dora"),
    [(name, dora) for name in FACTORED_NOW for dora in (False, True) if not (dora and name in NOT_WITH_DORA)],
)
def test_what_is_moved_is_the_merged_model(name: str, use_dora: bool) -> None:
    """Law 2 for moves of a weight along its inputs, and along axes where its update is constant."""
    params, x = {"w": normal(0, 2, 6, 4)}, normal(1, 3, 6)
    fn = lambda p, x: jnp.stack([x @ w for w in BENDS[name](p["w"])])  # noqa: E731
    factors = jlora.LoraFactors(
        normal(2, 2, 6, 2), normal(3, 2, 2, 4), normal(4, 2, 4) if use_dora else None, axes=jlora.Axes((0,), (1,), (2,))
    )
    assert_law(fn, {"w": factors}, params, x)


# ---- roles


def spectral_linen(batch: int) -> Any:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.SpectralNorm(nn.Dense(6))(x, update_stats=True)

    x = jnp.ones((batch, 5))
    variables = Net().init(jax.random.key(0), x)
    return lambda v, x: Net().apply(v, x, mutable=["batch_stats"]), variables, (x,), "params/Dense_0/kernel"


def spectral_nnx(batch: int) -> Any:
    module = nnx.SpectralNorm(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    graph, state = nnx.split(module)

    def fn(state: Any, x: Any) -> Any:
        module = nnx.merge(graph, state, copy=True)
        return module(x, update_stats=True), nnx.state(module)

    return fn, state, (jnp.ones((batch, 5)),), "layer_instance/kernel"


def spectral_haiku(batch: int) -> Any:
    def net(x: Any) -> Any:
        def getter(get: Any, value: Any, context: Any) -> Any:
            value = get(value)
            return hk.SpectralNorm(name="norm")(value) if context.full_name.endswith("/w") else value

        with hk.custom_getter(getter):
            return hk.Linear(6)(x)

    model, x = hk.transform_with_state(net), jnp.ones((batch, 5))
    params, state = model.init(jax.random.key(0), x)
    return lambda p, s, x: model.apply(p, s, None, x), params, (state, x), "linear/w"


def spectral_equinox(batch: int) -> Any:
    layer = eqx.nn.Linear(5, 6, key=jax.random.key(0))
    model, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", key=jax.random.key(1))
    over = lambda m, s, x: jax.vmap(m, in_axes=(0, None), out_axes=(0, None))(x, s)[0]  # noqa: E731
    return over, model, (state, jnp.ones((batch, 5))), "layer/weight"


def spectral_unbatched(_: int) -> Any:
    over, model, (state, x), path = spectral_equinox(1)
    del over
    return lambda m, s, x: m(x, s)[0], model, (state, x[0]), path


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("made", [spectral_linen, spectral_nnx, spectral_haiku, spectral_equinox, spectral_unbatched])
def test_the_products_of_a_power_iteration_do_not_say_what_is_input(made: Any, batch: int) -> None:
    """Roles come from the layer's own product, whatever computes most; the vectors of the norm get no adapter."""
    fn, params, args, path = made(batch)
    plan = planned(fn, params, *args)
    assert set(plan) == {path}
    expected = jlora.Axes((), (1,), (0,)) if made in (spectral_equinox, spectral_unbatched) else jlora.Axes()
    assert plan[path].axes == expected


def sigma(w: Any, u: Any, v: Any) -> Any:
    """A norm estimated from vectors that are arguments."""
    return (w @ u) @ v


BY_A_SCALAR: dict[str, Callable[..., Any]] = {
    "plain": lambda w, x, u, v: x @ (w / sigma(w, u, v)),
    "jitted": lambda w, x, u, v: x @ (w / jax.jit(sigma)(w, u, v)),
    "transposed": lambda w, x, u, v: (w.T * sigma(w, u, v)) @ x,
    "a scan": lambda w, x, u, v: x @ (w / lax.scan(lambda s, _: (s + sigma(w, u, v), None), 0.0, None, 3)[0]),
    "its own rule": lambda w, x, u, v: jax.nn.relu(x @ (w * jax.nn.relu(sigma(w, u, v)))),
    "a loss": lambda w, x, u, v: jnp.mean((x @ (w / sigma(w, u, v))) ** 2),
}


@pytest.mark.parametrize("name", sorted(BY_A_SCALAR))
def test_a_product_that_ends_in_a_scale_does_not_say_what_is_input(name: str) -> None:
    """One unbatched sample against vectors that are data: as much is computed, and before the layer's own product."""
    params, (x, u, v) = {"w": normal(0, 5, 6)}, (normal(1, 5), normal(2, 6), normal(3, 5))

    fn = lambda p, x, u, v: BY_A_SCALAR[name](p["w"], x, u, v)  # noqa: E731
    assert jlora.trace(fn, params, x, u, v)["w"].axes == jlora.Axes()


def test_where_all_that_is_computed_is_a_scalar_each_product_counts() -> None:
    """A gate, a function that returns its loss, and forces, in which the forward product of the last layer is dead."""
    params, (x, mask) = (
        {"w": normal(0, 5, 6), "out": normal(1, 6, 1), "gate": normal(2, 5, 1)},
        (normal(3, 4, 5), jnp.ones(4)),
    )

    def energy(params: Any, x: Any, mask: Any) -> Any:
        gate = jax.nn.sigmoid(x[0] @ params["gate"])[0]
        return gate * jnp.sum(mask[:, None] * (jnp.tanh(x @ params["w"]) @ params["out"]))

    for fn in (energy, jax.value_and_grad(energy, 1), jax.grad(energy, 1)):
        uses = jlora.trace(fn, params, x, mask)
        assert {path: use.axes for path, use in uses.items()} == dict.fromkeys(params, jlora.Axes())


def test_a_tied_table_that_is_looked_up_first_is_not_a_linear_weight() -> None:
    """However much the output projection computes."""
    params = {"table": normal(0, 9, 5), "w": normal(1, 5, 5)}
    fn = lambda p, ids: (p["table"][ids] @ p["w"]) @ p["table"].T  # noqa: E731
    uses = jlora.trace(fn, params, jnp.array([1, 2]))
    assert (uses["table"].kind, uses["table"].axes, uses["table"].flipped) == ("lookup", jlora.Axes(), True)
    assert set(jlora.plan(params, RANK2, uses)) == {"w"}


def test_of_products_that_compute_as_much_the_first_counts() -> None:
    """An autoencoder with tied weights is read as its encoder is; shared weights add up."""
    params, x = {"w": normal(0, 6, 4)}, normal(1, 3, 6)
    assert jlora.trace(lambda p, x: (x @ p["w"]) @ p["w"].T, params, x)["w"].axes == jlora.Axes()
    twice = jlora.trace(lambda p, x: jnp.tanh(x @ p["w"] @ p["w"].T @ p["w"]) @ p["w"].T @ p["w"], params, x)["w"]
    assert twice.axes == jlora.Axes()
    aside = jlora.trace(lambda p, x: (x[0, :4] @ p["w"].T, x @ p["w"]), params, x)["w"]
    assert (aside.axes, aside.flipped) == (jlora.Axes(), True)


# ---- gradients that never arrive

DEAD: dict[str, Callable[[Any, Any], Any]] = {
    "teacher": lambda p, x: (x @ p["w"], still(x @ p["t"])),
    "argmax": lambda p, x: (x @ p["w"], jnp.argmax(x @ p["t"], -1)),
    "comparison": lambda p, x: jnp.where(x @ p["t"] > 0, x @ p["w"], 0),
    "rounding": lambda p, x: x @ p["w"] + jnp.round(x @ p["t"]),
    "codebook": lambda p, x: x @ p["w"] + still(p["t"][jnp.argmax(x @ p["t"], -1)]),
    "in jit": lambda p, x: (x @ p["w"], jax.jit(lambda t: jax.checkpoint(lambda t: still(x @ t))(t))(p["t"])),
    "in scan": lambda p, x: lax.scan(lambda c, _: (c @ p["w"] + still(c @ p["t"]), None), x, length=2)[0],
    "in one branch": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: still(x @ p["t"])),
    "condition of a while": lambda p, x: (
        x @ p["w"],
        lax.while_loop(lambda c: jnp.sum(c @ p["t"]) < 0, lambda c: c + 1, x),
    ),
}
ALIVE: dict[str, Callable[[Any, Any], Any]] = {
    "beside a stopped use": lambda p, x: (x @ p["w"], x @ p["t"], still(x @ p["t"])),
    "an iteration later": lambda p, x: lax.scan(lambda c, _: ((c[1] @ p["w"], c[0] @ p["t"]), None), (x, x), length=3)[
        0
    ][0],
    "state": lambda p, x: (x @ p["w"], {"stats": jnp.mean(x @ p["t"], 0)}),
    "straight through": lambda p, x: x @ p["w"] @ (p["t"] + still(jnp.round(p["t"]) - p["t"])),
    "custom rule": lambda p, x: jax.nn.relu(jax.nn.silu(x @ p["w"]) @ p["t"]),
    "predictions alone": lambda p, x: jnp.argmax(x @ p["w"] @ p["t"], -1),
}


@pytest.mark.parametrize("name", sorted(DEAD))
def test_a_weight_that_no_gradient_reaches_is_left_out(name: str) -> None:
    """Its adapter would never train. Naming it as a target is an error."""
    params, x = {"w": normal(0, 6, 6), "t": normal(1, 6, 6)}, normal(2, 3, 6)
    plan = planned(DEAD[name], params, x)
    assert set(plan) == {"w"}
    expect(plan.left_out["t"], "no gradient of a result reaches it")
    text = message(ValueError, lambda: planned(DEAD[name], params, x, targets=("^t$",)))
    expect(text, "target '^t$' matches 't'", "no gradient of a result reaches it")
    if name != "condition of a while":
        grads = jax.grad(lambda p: sum(jnp.sum(y) for y in jax.tree.leaves(DEAD[name](p, x)) if y.dtype == x.dtype))
        assert not np.any(grads(params)["t"])


@pytest.mark.parametrize("name", sorted(ALIVE))
def test_a_weight_that_some_gradient_reaches_is_adapted(name: str) -> None:
    params, x = {"w": normal(0, 6, 6), "t": normal(1, 6, 6)}, normal(2, 3, 6)
    assert set(planned(ALIVE[name], params, x)) == {"w", "t"}


def test_the_reason_is_that_of_the_use_that_counts() -> None:
    """For a matrix used behind a stop_gradient and in a solver, the solver is named."""
    params, x = {"w": normal(0, 6, 6), "t": jnp.eye(6)}, normal(2, 6)
    fn = lambda p, x: (x @ p["w"] + jnp.linalg.solve(p["t"], x), still(p["t"]))  # noqa: E731
    why = planned(fn, params, x).left_out["t"]
    assert "lu" in why or "solve" in why, why


# ---- what cannot be adapted is named


def test_quantized_weights_are_left_out_by_name_and_the_way_out_works() -> None:
    """int8 weights, looked up or multiplied, are frozen; adapters of the dequantized tree train on top of them."""
    rng = np.random.default_rng(0)
    stored = {
        "embed": jnp.asarray(rng.integers(-9, 9, (9, 6)), "int8"),
        "dense": {"q": jnp.asarray(rng.integers(-9, 9, (6, 4)), "int8"), "scale": jnp.full((1, 4), 0.1)},
        "groups": {"q": jnp.asarray(rng.integers(-9, 9, (4, 4)), "int8"), "scale": jnp.full((2, 4), 0.1)},
        "counter": jnp.zeros((), "int32"),
    }
    ids = jnp.array([1, 8, 2])

    def dequantized(tree: Any) -> Any:
        groups = tree["groups"]
        return {
            "embed": tree["embed"].astype(jnp.float32) / 9,
            "dense": tree["dense"]["q"].astype(jnp.float32) * tree["dense"]["scale"],
            "groups": groups["q"].astype(jnp.float32) * jnp.repeat(groups["scale"], 2, axis=0),
        }

    def model(tree: Any, ids: Any) -> Any:
        return jnp.tanh(tree["embed"][ids] @ tree["dense"]) @ tree["groups"]

    text = message(ValueError, lambda: planned(lambda t, ids: model(dequantized(t), ids), stored, ids))
    for path, use in (("embed", "looked up"), ("dense/q", "dot_general"), ("groups/q", "dot_general")):
        expect(text, f"{path}: int8, {use}; to adapt it", "jlora.QuantizedArray", "attach to the dequantized tree")
    assert "counter" not in text
    text = message(
        ValueError, lambda: planned(lambda t, ids: model(dequantized(t), ids), stored, ids, targets=("dense/q",))
    )
    expect(text, "'dense/q'", "int8: not a floating matrix", "attach to the dequantized tree")

    uses = jlora.trace(model, jax.eval_shape(dequantized, stored), ids)
    adapters = adapters_for(model, dequantized(stored), ids, targets=("dense", "groups"))
    assert set(jlora.plan(dequantized(stored), RANK2, uses)) == {"dense", "groups"}
    apply = jlora.lora(model, materialize="error")

    @jax.jit
    def both(adapters: Any) -> Any:
        ours = lambda a: jnp.sum(jnp.sin(apply(jlora.attach(dequantized(stored), a), ids)))  # noqa: E731
        merged = lambda a: jnp.sum(jnp.sin(model(jlora.merge(dequantized(stored), a), ids)))  # noqa: E731
        return [jax.value_and_grad(f)(adapters) for f in (ours, merged)]

    chex.assert_trees_all_close(*both(adapters), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_weights_are_floating(dtype: str) -> None:
    """They are adapted where the model casts them."""
    params = {"w": jnp.ones((6, 4), dtype)}
    plan = planned(lambda p, x: x @ p["w"].astype(jnp.float32), params, jnp.ones((2, 6)))
    assert plan["w"].axes == jlora.Axes()


def test_complex_weights_and_casts_to_complex_are_left_out() -> None:
    params = {"c": jnp.ones((6, 4), "complex64"), "cast": normal(0, 6, 4), "w": normal(1, 6, 4)}

    def fn(p: Any, x: Any) -> Any:
        z = x.astype("complex64")
        return (z @ p["c"]).real + (z @ p["cast"].astype("complex64")).real + x @ p["w"]

    plan = planned(fn, params, normal(2, 3, 6))
    assert set(plan) == {"w"}
    expect(plan.left_out["c"], "complex64", "real and imaginary parts as two leaves")
    expect(plan.left_out["cast"], "a cast to complex64")


class Whitened(nn.Module):
    """A layer after a whitening by a running covariance, which a product consumes."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        whiten = self.variable("batch_stats", "whiten", jnp.eye, x.shape[-1])
        mixed = self.variable("mixing", "matrix", jnp.eye, x.shape[-1])
        return nn.Dense(3)(x @ whiten.value @ mixed.value)


def test_state_of_linen_gets_no_adapter() -> None:
    """Statistics are refused even when named; another collection is adapted when it is named."""
    x = normal(0, 2, 4)
    variables = Whitened().init(jax.random.key(0), x)
    plan = planned(Whitened().apply, variables, x)
    assert set(plan) == {"params/Dense_0/kernel"}
    expect(plan.left_out["batch_stats/whiten"], "state", "'batch_stats'")
    expect(plan.left_out["mixing/matrix"], "another collection than params", "name it")
    assert set(planned(Whitened().apply, variables, x, targets=("mixing",))) == {"mixing/matrix"}
    for field in ("targets", "train_also"):
        text = message(ValueError, lambda f=field: planned(Whitened().apply, variables, x, **{f: ("whiten",)}))
        expect(text, "'batch_stats/whiten'", "'batch_stats'")
    both = planned(Whitened().apply, variables, x, train_also=("bias|whiten",))
    assert both["params/Dense_0/bias"].axes is None
    assert "batch_stats/whiten" in both.left_out


def test_variables_of_nnx_that_are_not_parameters_get_no_adapter() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.whiten = nnx.BatchStat(jnp.eye(4))
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.linear(x @ self.whiten.get_value()))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    plan = planned(lambda s, x: nnx.merge(graph, s, copy=True)(x), state, normal(0, 2, 4))
    assert set(plan) == {"linear/kernel"}
    expect(plan.left_out["whiten"], "BatchStat")
    assert set(plan.left_out) == {"whiten"}


# ---- rows picked by constants

PICKED: dict[str, Callable[[Any, Any], Any]] = {
    "rows": lambda p, x: x @ p["w"][np.array([3, 1, 0, 2, 5, 4])],
    "columns": lambda p, x: x @ p["w"][:, jnp.array([1, 0, 1])],
    "take": lambda p, x: x @ jnp.take(p["w"], np.array([3, 1, 0, 2, 5, 4]), axis=0),
    "computed": lambda p, x: x @ p["w"][(jnp.arange(6) + 2) % 6],
    "in a scan": lambda p, x: lax.scan(lambda c, _: (c + x @ p["w"][::-1][jnp.arange(6)], None), x[:, :4], length=2)[0],
    "relative positions": lambda p, x: jnp.einsum("bd,ijd->bij", x[:, :4], p["w"][np.array([[0, 1], [5, 0]])]),
}
LOOKED_UP: dict[str, Callable[[Any, Any], Any]] = {
    "positions": lambda p, x: jnp.sin(p["w"][jnp.arange(3)] + x[:, :4]) @ p["v"],
    "positions through a weight": lambda p, x: p["w"][jnp.arange(3)] @ p["v"] + x[:, :4],
    "by data": lambda p, x: x @ p["w"][jnp.argsort(x[0])],
    "returned": lambda p, x: (p["w"][np.array([1, 0])], x),
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", sorted(PICKED) + sorted(LOOKED_UP))
def test_rows_picked_by_constants_are_a_weight_where_a_product_takes_them(name: str, use_dora: bool) -> None:
    """Law 2 without materializing; rows that no product with data takes are a lookup, like rows picked by data."""
    fn = (PICKED | LOOKED_UP)[name]
    params, x = {"w": normal(0, 6, 4), "v": normal(1, 4, 4)}, normal(2, 3, 6)
    uses = jlora.trace(fn, params, x)
    assert uses["w"].kind == ("matmul" if name in PICKED else "lookup")
    adapters = adapters_for(fn, params, x, targets=("^w$",), use_dora=use_dora)
    if name in PICKED:
        explained = jlora.explain(fn, jlora.attach(params, adapters), x)
        assert {e.primitive for e in explained.events} == {"dot_general"}
    assert_law(fn, adapters, params, x)


# ---- the config


def test_numbers_of_numpy_are_numbers() -> None:
    """A config of NumPy and JAX scalars equals that of Python numbers, hash and JSON included."""
    given = jlora.LoraConfig(
        rank=np.int64(4),  # type: ignore[arg-type]
        alpha=np.float32(8.5),  # type: ignore[arg-type]
        dropout=np.array(0.25),  # type: ignore[arg-type]
        use_dora=np.bool_(True),  # type: ignore[arg-type]
        overrides=(jlora.Override("x", rank=np.int32(2), alpha=jnp.float32(3)),),  # type: ignore[arg-type]
    )
    plain = jlora.LoraConfig(4, 8.5, dropout=0.25, use_dora=True, overrides=(jlora.Override("x", rank=2, alpha=3.0),))
    assert given == plain
    assert hash(given) == hash(plain)
    assert jlora.LoraConfig.from_json(given.to_json()) == plain
    assert type(given.rank) is int
    assert type(given.for_path("x").rank) is int
    for field, value in (("rank", np.float32(4)), ("alpha", "x"), ("dropout", None), ("use_dora", "yes")):
        text = message(ValueError, lambda f=field, v=value: jlora.LoraConfig(**cast(Any, {f: v})))
        expect(text, f"{field} = {getattr(value, 'item', lambda v=value: v)()!r}; expected")
