"""The laws of the transform, over drawn dimension numbers, shapes, layouts, dtypes and methods.

Each example draws one way to use one weight, and checks every law in one compiled function.
"""

from __future__ import annotations

import dataclasses
import math
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

METHODS = {
    "lora": jlora.LoraConfig(rank=2, alpha=3.0, targets=("w",), exclude=()),
    "rslora": jlora.LoraConfig(rank=2, alpha=3.0, targets=("w",), exclude=(), use_rslora=True),
    "dora": jlora.LoraConfig(rank=2, targets=("w",), exclude=(), use_dora=True),
    "gaussian": jlora.LoraConfig(rank=2, targets=("w",), exclude=(), init="gaussian"),
    "orthogonal": jlora.LoraConfig(rank=2, targets=("w",), exclude=(), init="orthogonal"),
}
ROUNDED = ("dora", "orthogonal")
"""Methods whose fresh adapters change nothing up to rounding, and not bit for bit."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One use of one weight: ``use(w, x)``, and the axes that a person would name."""

    use: Callable[[Any, Any], Any]
    w: tuple[int, ...]
    x: tuple[int, ...]
    axes: jlora.Axes


@st.composite
def dot_cases(draw: st.DrawFn) -> Case:
    """Any dot_general: any number of batch, contracted and free dimensions, in any order, on either side."""
    roles = draw(
        st.permutations(["input", "output", *draw(st.lists(st.sampled_from(["batch", "input", "output"]), max_size=2))])
    )
    w = tuple(draw(st.sampled_from([2, 3, 4, 5])) for _ in roles)
    groups = {role: [d for d, r in enumerate(roles) if r == role] for role in ("batch", "input", "output")}
    shared = draw(st.permutations(groups["batch"] + groups["input"]))
    x_dims: list[int | None] = draw(st.permutations([*shared, *[None] * draw(st.integers(0, 2))]))
    x = tuple(draw(st.sampled_from([2, 3, 6])) if d is None else w[d] for d in x_dims)

    def numbers(role: str) -> tuple[list[int], list[int]]:
        return [x_dims.index(d) for d in groups[role]], groups[role]

    (xc, wc), (xb, wb) = numbers("input"), numbers("batch")
    if draw(st.booleans()):
        use = lambda w, x: lax.dot_general(x, w, ((xc, wc), (xb, wb)))  # noqa: E731
    else:
        use = lambda w, x: lax.dot_general(w, x, ((wc, xc), (wb, xb)))  # noqa: E731
    return Case(use, w, x, jlora.Axes(*(tuple(groups[r]) for r in ("batch", "input", "output"))))


@st.composite
def conv_cases(draw: st.DrawFn) -> Case:
    """Convolutions over one or two dimensions: layouts, strides, dilations, padding and groups."""
    spatial = draw(st.sampled_from(["W", "HW"]))
    groups, n = draw(st.sampled_from([1, 1, 2, 3])), len(spatial)
    i, o = groups * draw(st.sampled_from([1, 2])), groups * draw(st.sampled_from([2, 3]))
    x_layout, w_layout = draw(st.permutations("NC" + spatial)), draw(st.permutations("IO" + spatial))
    y_layout = draw(st.permutations("NC" + spatial))
    sizes = {"I": i // groups, "O": o, "H": 3, "W": 2}
    w = tuple(sizes[c] for c in w_layout)
    x = tuple({"N": 2, "C": i, "H": 7, "W": 6}[c] for c in x_layout)
    options: dict[str, Any] = {
        "window_strides": [draw(st.sampled_from([1, 2])) for _ in range(n)],
        "padding": draw(st.sampled_from(["SAME", "VALID"])),
        "rhs_dilation": [draw(st.sampled_from([1, 2])) for _ in range(n)],
        "feature_group_count": groups,
        "dimension_numbers": ("".join(x_layout), "".join(w_layout), "".join(y_layout)),
    }
    outputs = (w_layout.index("O"),)
    axes = jlora.Axes((), tuple(d for d in range(n + 2) if d not in outputs), outputs)
    return Case(lambda w, x: lax.conv_general_dilated(x, w, **options), w, x, axes)


@st.composite
def moved_cases(draw: st.DrawFn) -> Case:
    """A chain of rearrangements of a (stacked, inputs, outputs) weight, then a matmul of every slice."""
    layers, inputs, outputs = draw(st.sampled_from([2, 3])), 6, 4
    steps = draw(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4))

    def use(w: Any, x: Any) -> Any:
        for step in steps:
            w = MOVES[step](w)
        slices = [w[0], w[jnp.argmax(x[0]) % 2], *jnp.split(w, layers)[1:]]
        return [x @ s.reshape(s.shape[-2:]) for s in slices] + [jnp.einsum("bi,lio->lbo", x, w)]

    return Case(use, (layers, inputs, outputs), (3, inputs), jlora.Axes((0,), (1,), (2,)))


MOVES: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda w: w.transpose(2, 0, 1).transpose(1, 2, 0),
    "reshape": lambda w: w.reshape(w.shape[0], 2, 3, 2, 2)[:, :, :, None].reshape(w.shape),
    "reverse": lambda w: w[:, ::-1, ::-1],
    "scale": lambda w: -2.0 * w / 3.0,
    "channels": lambda w: w * jnp.arange(1.0, 5.0, dtype=w.dtype) * jnp.arange(6, dtype=w.dtype)[:, None],
    "concatenate": lambda w: jnp.concatenate([w[..., 2:], w[..., :2]], -1),
    "stack": lambda w: jnp.stack([w[i] for i in range(w.shape[0])]),
    "unstack": lambda w: jnp.stack(list(w)),
    "add": lambda w: w + (w * 0.5 - 1.0),
    "pad": lambda w: jnp.pad(w, ((0, 0), (1, 2), (0, 1)))[:, 1:7, :4],
    "where": lambda w: jnp.where(jnp.arange(w.shape[0])[:, None, None] == 1, w, 0.5 * w),
    "jit": lambda w: jax.jit(lambda v: v.swapaxes(1, 2))(w).swapaxes(1, 2),
    "cast": lambda w: w.astype(jnp.float64 if jax.config.read("jax_enable_x64") else w.dtype),
    "set": lambda w: w.at[:, jnp.array([1, 4])].set(0.5).at[..., -1].set(0.0),
    "add at": lambda w: w.at[:, 2].add(1.5).at[1].subtract(1.0),
    "multiply at": lambda w: (
        w.at[:, jnp.array([1, 4, 1])].multiply(0.5).at[..., 1:3].multiply(jnp.array([2, 3], w.dtype))
    ),
    "update slice": lambda w: lax.dynamic_update_slice(w, jnp.ones((w.shape[0], 2, 4), w.dtype), (0, 3, 0)),
    "barrier": lambda w: lax.optimization_barrier((jnp.zeros(3), w))[1],
    "precision": lambda w: lax.reduce_precision(w, 8, 23),
}


def lookup_case(ids: tuple[int, ...]) -> Case:
    def use(w: Any, x: Any) -> Any:
        rows = jnp.take(w, jnp.asarray(ids), axis=0, mode="clip")
        return jnp.tanh(rows.sum(0)) @ w.T, x

    return Case(use, (5, 4), (2,), jlora.Axes())


def experts_case(rows: list[int]) -> Case:
    sizes = jnp.asarray(rows, jnp.int32)
    shape = (len(rows), 4, 3)
    return Case(lambda w, x: lax.ragged_dot(x, w, sizes), shape, (sum(rows), 4), jlora.Axes((0,), (1,), (2,)))


cases = st.one_of(
    dot_cases(),
    dot_cases(),
    conv_cases(),
    moved_cases(),
    st.lists(st.integers(0, 4), min_size=1, max_size=4).map(lambda ids: lookup_case(tuple(ids))),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(experts_case),
)


TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2, "float8_e4m3fn": 0.15, "float8_e5m2": 0.3}


def close(got: Any, want: Any, dtype: str) -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, atol=TOLERANCE[dtype] * (1 + np.abs(w).max(initial=0)), rtol=0)


def randomized(key: jax.Array, adapters: jlora.Adapters) -> jlora.Adapters:
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a program's arrays are, and where.

    Attributes:
      base, x, factors: dtypes of the weight, of the activations that it is cast to, and of the adapters.
      promotion: whether JAX may promote dtypes by itself.
      offloaded: whether the weight is in host memory, and fetched where it is used.
    """

    base: str = "float32"
    x: str = "float32"
    factors: str = "float32"
    promotion: Any = "standard"
    offloaded: bool = False


MODES = {
    "float32": Mode(),
    "bfloat16": Mode("bfloat16", "bfloat16"),
    "bfloat16 factors": Mode(factors="bfloat16"),
    "float16 factors": Mode(factors="float16"),
    "bfloat16 all over": Mode("bfloat16", "bfloat16", "bfloat16"),
    "float8": Mode("float8_e4m3fn", "bfloat16"),
    "float8, wide": Mode("float8_e5m2", "float32", "bfloat16"),
    "strict": Mode("bfloat16", "bfloat16", promotion="strict"),
    "strict, mixed": Mode("bfloat16", "float32", "float16", promotion="strict"),
    "strict, float8": Mode("float8_e4m3fn", "float32", promotion="strict"),
    "offloaded": Mode(offloaded=True),
    "offloaded, strict": Mode("bfloat16", "float32", promotion="strict", offloaded=True),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@hypothesis.settings(max_examples=4)
@hypothesis.given(cases, st.sampled_from(sorted(METHODS)))
def test_the_adapted_model_is_the_merged_model(mode: Mode, case: Case, method: str) -> None:
    """Laws 1 to 3: fresh adapters change nothing, bit for bit in float32; outputs and gradients equal those
    through the merged weights; `trace` finds the axes; detach inverts attach, unmerge inverts merge."""
    with jax.numpy_dtype_promotion(mode.promotion):
        check_laws(mode, case, method)


def check_laws(mode: Mode, case: Case, method: str) -> None:
    config = dataclasses.replace(METHODS[method], dtype=mode.factors)

    def fn(params: Any, x: Any) -> Any:
        w = jax.device_put(params["w"], jax.memory.Space.Device) if mode.offloaded else params["w"]
        return case.use(w.astype(mode.x), x)

    shapes = {"w": jax.ShapeDtypeStruct(case.w, mode.base)}, jax.ShapeDtypeStruct(case.x, mode.x)
    uses = jlora.trace(fn, *shapes)
    assert uses["w"].axes == case.axes
    # DoRA's gain follows batch and outputs: a use that sums over some of them and keeps others is materialized.
    apply = jlora.lora(fn, materialize="allow" if method == "dora" else "error")

    def score(outputs: Any) -> Any:
        ys = [y.astype(jnp.float32) for y in jax.tree.leaves(outputs)]
        # The sine of a large number tells its rounding errors, not its value.
        return sum(jnp.sum(jnp.sin(y / (1 + lax.stop_gradient(jnp.abs(y).max(initial=0))))) for y in ys)

    @jax.jit
    def everything(key: Any) -> Any:
        w = lax.optimization_barrier((jax.random.normal(key, case.w) / 2).astype(mode.base))
        params = {"w": jax.device_put(w, jax.memory.Space.Host) if mode.offloaded else w}
        x = jax.random.normal(jax.random.fold_in(key, 1), case.x, mode.x)
        fresh = jlora.init(key, params, config, uses)
        # XLA may leave out a rounding of what it computes itself: the barrier makes the numbers given ones.
        adapters = lax.optimization_barrier(randomized(key, fresh))
        exact = {"w": w.astype(jnp.float32)}  # what is merged into a narrow base is rounded
        straight, d_straight = jax.value_and_grad(lambda a: score(apply(jlora.attach(params, a), x)))(adapters)
        merged, d_merged = jax.value_and_grad(lambda a: score(case.use(jlora.merge(exact, a)["w"].astype(mode.x), x)))(
            adapters
        )
        folded = jlora.merge(params, adapters)
        base = folded if config.use_dora else jlora.unmerge(folded, adapters)
        again, taken = jlora.detach(jlora.attach(params, adapters))
        assert again["w"] is params["w"]
        assert taken["w"] is adapters["w"]
        assert jax.typeof(folded["w"]) == jax.typeof(params["w"])
        return {
            "fresh": (fn(params, x), apply(jlora.attach(params, fresh), x)),
            "adapted": (
                apply(jlora.attach(params, adapters), x),
                case.use(jlora.merge(exact, adapters)["w"].astype(mode.x), x),
            ),
            "folded": (folded, jlora.merge(exact, adapters)),
            "scores": (straight, merged),
            "gradients": (d_straight, d_merged),
            "bases": (params, params if config.use_dora else base),
        }

    found = everything(jax.random.key(math.prod(case.w) + math.prod(case.x)))
    for y, z in zip(jax.tree.leaves(found["fresh"][0]), jax.tree.leaves(found["fresh"][1]), strict=True):
        assert y.dtype == z.dtype
        if mode.x == "float32" and method not in ROUNDED:
            np.testing.assert_array_equal(np.asarray(y), np.asarray(z))
        close(z, y, max(mode.x, mode.factors, key=lambda dtype: jnp.finfo(dtype).eps))
    dtypes = {"adapted": mode.x, "folded": mode.base, "bases": mode.base}
    if mode.x == "float32":
        dtypes |= {"scores": "float32", "gradients": mode.factors}
    for name, dtype in dtypes.items():
        got, want = found[name]
        close(got, want, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_merging_sums_in_float32_and_rounds_once(method: str, dtype: str) -> None:
    """merge of a narrow weight is the float32 sum rounded once, not a sum of rounded parts."""
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (7, 5)).astype(dtype)}
    adapters = randomized(key, jlora.init(key, params, METHODS[method]))
    wide = jlora.merge(jax.tree.map(lambda x: x.astype("float32"), params), adapters)
    np.testing.assert_array_equal(
        np.asarray(jlora.merge(params, adapters)["w"], "float32"), np.asarray(wide["w"].astype(dtype), "float32")
    )


ODD: dict[str, Callable[[Any, Any], Any]] = {
    "int8 activations": lambda w, x: jnp.einsum("bi,io->bo", (4 * x).astype("int8"), w),
    "one-hot booleans": lambda w, x: jnp.einsum("bi,io->bo", jnp.arange(6)[None] == jnp.arange(3)[:, None], w),
    "wider weights": lambda w, x: jnp.einsum("bi,io->bo", x.astype("bfloat16"), w),
    "unstacked columns": lambda w, x: x @ sum(jnp.unstack(w.reshape(6, 2, 2), axis=1)),
    "rounded weights": lambda w, x: x @ lax.reduce_precision(w, 8, 7),
    "filled lookups": lambda w, x: jnp.take(w, jnp.array([1, 9, -7]), axis=0, mode="fill", fill_value=5.0),
    "filled columns": lambda w, x: x @ w.at[:, jnp.array([0, 9])].get(mode="fill", fill_value=5.0),
    "scans of no length": lambda w, x: (x @ w, jax.lax.scan(lambda c, _: (c @ w @ w.T, None), x, length=0)[0]),
}


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_uses_are_the_merged_model_too(name: str) -> None:
    """Law 2 where the model mixes dtypes, reads out of bounds, or loops over nothing."""
    key = jax.random.key(0)
    params, x = {"w": jax.random.normal(key, (6, 4))}, jax.random.normal(key, (3, 6))
    fn = lambda params, x: ODD[name](params["w"], x)  # noqa: E731
    adapters = randomized(key, jlora.init(key, params, METHODS["lora"]))

    @jax.jit
    def both(adapters: Any) -> Any:
        adapted = lambda a: jlora.lora(fn, materialize="error")(jlora.attach(params, a), x)  # noqa: E731
        merged = lambda a: fn(jlora.merge(params, a), x)  # noqa: E731
        score = lambda a, f: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(a)))  # noqa: E731
        return [(f(adapters), jax.grad(score)(adapters, f)) for f in (adapted, merged)]

    got, want = both(adapters)
    close(got, want, "bfloat16" if name in ("wider weights", "rounded weights") else "float32")


FLOAT8: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...], jlora.Axes]] = {
    "dot_general": (
        lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32),
        (8, 4),
        jlora.Axes(),
    ),
    "ragged_dot_general": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2]), preferred_element_type=jnp.float32),
        (2, 8, 4),
        jlora.Axes((0,), (1,), (2,)),
    ),
    "conv_general_dilated": (
        lambda w, x: lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), preferred_element_type=jnp.float32
        ),
        (3, 8, 4),
        jlora.Axes((), (0, 1), (2,)),
    ),
    "gather": (lambda w, x: w[jnp.array([2, 0])].astype(jnp.float32), (8, 4), jlora.Axes()),
}


@pytest.mark.parametrize("dtypes", [("float8_e4m3fn", "float8_e4m3fn"), ("bfloat16", "float8_e5m2")], ids="x".join)
@pytest.mark.parametrize("primitive", sorted(FLOAT8))
def test_a_small_update_of_a_float8_weight_is_not_lost(primitive: str, dtypes: tuple[str, str]) -> None:
    """Low-rank products of float8 operands run in bfloat16: an update of 1e-4 has its value, and its gradient."""
    use, shape, axes = FLOAT8[primitive]
    if dtypes[0] != dtypes[1] and primitive != "dot_general":
        pytest.skip("JAX has no product of this kind over two dtypes")
    x, w = jnp.ones((3, 8), dtypes[0]), jnp.zeros(shape, dtypes[1])
    batch, inputs, outputs = axes.sizes(shape)
    # A looked-up row is float8 itself, so its update has to be larger: the factors are what is out of float8's range.
    a, b = (1e-4, 1e4) if primitive == "gather" else (3e-3, 1e-2)
    factors = jlora.LoraFactors(jnp.full((*batch, *inputs, 1), a), jnp.full((*batch, 1, *outputs), b), axes=axes)
    apply = jlora.lora(lambda p, x: use(p["w"], x), materialize="error")

    def run(factors: Any, w: Any, x: Any) -> Any:
        return jnp.sum(apply(jlora.attach({"w": w}, {"w": factors}), x))

    wide = w.astype(jnp.float32), x.astype(jnp.float32)
    got, want = (jax.jit(jax.value_and_grad(run))(factors, *operands) for operands in ((w, x), wide))
    assert float(want[0]) > 1e-4
    chex.assert_trees_all_close(got, want, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_low_rank_product_of_float8(dtype: str) -> None:
    """It runs in bfloat16, which is the dtype of its result."""
    x, a, b = jnp.ones((2, 3), dtype), jnp.full((3, 1), 1e-3), jnp.full((1, 5), 1e-2)
    y = jlora.low_rank_product(x, a, b)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), np.full((2, 5), 3e-5), rtol=1e-2)


def test_low_rank_product_is_the_product_and_has_its_gradient() -> None:
    """(x·a)·b over several input and output axes, with gradients equal to einsum's, and of second order too."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, a, b = (jax.random.normal(k, s) for k, s in zip(keys, [(3, 2, 4, 5), (4, 5, 2), (2, 3, 6)], strict=True))

    def product(x: Any, a: Any, b: Any) -> Any:
        return jlora.low_rank_product(x, a, b, inputs=2)

    def reference(x: Any, a: Any, b: Any) -> Any:
        return jnp.einsum("nmij,ijr,rop->nmop", x, a, b)

    def curvature(f: Any) -> Any:
        loss = lambda *args: jnp.sum(jnp.sin(f(*args)))  # noqa: E731
        grad = jax.grad(loss, argnums=(0, 1, 2))
        return f(x, a, b), grad(x, a, b), jax.grad(lambda a: jnp.sum(grad(x, a, b)[2] ** 2))(a)

    close(jax.jit(curvature, static_argnums=0)(product), jax.jit(curvature, static_argnums=0)(reference), "float32")
    with pytest.raises(ValueError, match=r"got x \(3, 2, 4, 5\), a \(4, 5, 2\), b \(2, 3, 6\) with inputs=1"):
        jlora.low_rank_product(x, a, b)
