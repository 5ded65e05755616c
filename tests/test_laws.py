"""The laws of the transform, over drawn dimension numbers, shapes, layouts, dtypes and methods.

Each example draws one way to use one weight, and checks every law in one compiled function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora

METHODS = {
    "lora": jlora.LoraConfig(rank=2, targets=("w",), exclude=()),
    "rslora": jlora.LoraConfig(rank=2, alpha=3.0, targets=("w",), exclude=(), use_rslora=True),
    "dora": jlora.LoraConfig(rank=2, targets=("w",), exclude=(), use_dora=True),
}


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


def close(got: Any, want: Any, dtype: str) -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        tolerance = (3e-2 if dtype == "bfloat16" else 2e-5) * (1 + np.abs(w).max(initial=0))
        np.testing.assert_allclose(g, w, atol=tolerance, rtol=0)


def randomized(key: jax.Array, adapters: jlora.Adapters) -> jlora.Adapters:
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


@hypothesis.settings(max_examples=30)
@hypothesis.given(cases, st.sampled_from(sorted(METHODS)), st.sampled_from(["float32", "float32", "bfloat16"]))
def test_the_adapted_model_is_the_merged_model(case: Case, method: str, dtype: str) -> None:
    """Laws 1 to 3: fresh adapters change nothing, bit for bit in float32; outputs and gradients equal those
    through the merged weights; `trace` finds the axes; detach inverts attach, unmerge inverts merge."""
    config = METHODS[method]

    def fn(params: Any, x: Any) -> Any:
        return case.use(params["w"], x)

    shapes = {"w": jax.ShapeDtypeStruct(case.w, dtype)}, jax.ShapeDtypeStruct(case.x, dtype)
    uses = jlora.trace(fn, *shapes)
    assert uses["w"].axes == case.axes
    # DoRA's gain follows batch and outputs: a use that sums over some of them and keeps others is materialized.
    apply = jlora.lora(fn, materialize="allow" if method == "dora" else "error")

    def score(outputs: Any) -> Any:
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(outputs))

    @jax.jit
    def everything(key: Any) -> Any:
        params = {"w": jax.random.normal(key, case.w, dtype) / 2}
        x = jax.random.normal(jax.random.fold_in(key, 1), case.x, dtype)
        fresh = jlora.init(key, params, config, uses)
        adapters = randomized(key, fresh)
        straight, d_straight = jax.value_and_grad(lambda a: score(apply(jlora.attach(params, a), x)))(adapters)
        merged, d_merged = jax.value_and_grad(lambda a: score(fn(jlora.merge(params, a), x)))(adapters)
        folded = jlora.merge(params, adapters)
        base = folded if config.use_dora else jlora.unmerge(folded, adapters)
        again, taken = jlora.detach(jlora.attach(params, adapters))
        assert again["w"] is params["w"]
        assert taken["w"] is adapters["w"]
        return {
            "fresh": (fn(params, x), apply(jlora.attach(params, fresh), x)),
            "adapted": (apply(jlora.attach(params, adapters), x), fn(folded, x)),
            "scores": (straight, merged),
            "gradients": (d_straight, d_merged),
            "bases": (params, params if config.use_dora else base),
        }

    found = everything(jax.random.key(math.prod(case.w) + math.prod(case.x)))
    for y, z in zip(jax.tree.leaves(found["fresh"][0]), jax.tree.leaves(found["fresh"][1]), strict=True):
        assert y.dtype == z.dtype
        if dtype == "float32" and method != "dora":
            np.testing.assert_array_equal(np.asarray(y), np.asarray(z))
    for name in ("fresh", "adapted", "bases") + (("scores", "gradients") if dtype == "float32" else ()):
        got, want = found[name]
        close(got, want, dtype)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_merging_sums_in_float32_and_rounds_once(method: str) -> None:
    """merge of a bfloat16 weight is the float32 sum rounded once, not a sum of rounded parts."""
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (7, 5), "bfloat16")}
    adapters = randomized(key, jlora.init(key, params, METHODS[method]))
    wide = jlora.merge(jax.tree.map(lambda x: x.astype("float32"), params), adapters)
    np.testing.assert_array_equal(
        np.asarray(jlora.merge(params, adapters)["w"], "float32"), np.asarray(wide["w"].astype("bfloat16"), "float32")
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
