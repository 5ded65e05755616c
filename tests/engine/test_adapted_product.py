"""The forms of the product with an adapted weight: each equals the plain one, and each platform gets its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora._src.engine.factors import adapted_product as forms
from jlora._src.engine.factors.named_axes import RANK as RANK_AXIS
from tests.toys import MLP, RANK, TOYS, adapters_for, mlp, normal

LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    **TOYS,
    "vmap over rows": (lambda p, x: jax.vmap(lambda row: mlp(p, row))(x), MLP.params, MLP.x),
    "weight on the left": (
        lambda p, x: jnp.tanh(jax.vmap(lambda row: p["w"] @ row)(x)),
        {"w": normal(1, 12, 8)},
        normal(2, 5, 8),
    ),
    "heads": (
        lambda p, x: jnp.einsum("bthd,hdo->bto", jnp.einsum("bti,ihd->bthd", x, p["q"]), p["o"]),
        {"q": normal(1, 8, 4, 5), "o": normal(3, 4, 5, 8)},
        normal(4, 2, 6, 8),
    ),
    "several inputs": (
        lambda p, x: lax.dot_general(x, p["w"], (((1, 2), (1, 0)), ((), ()))),
        {"w": normal(1, 5, 4, 7)},
        normal(2, 6, 4, 5),
    ),
}


def equations(jaxpr: Any) -> Iterator[Any]:
    """The adapted products in a jaxpr, and in the jaxprs in it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "adapted_product":
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(getattr(p, "jaxpr", p), "eqns")
        ):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_form_equals_the_plain_one(name: str, dora: bool, dtype: str) -> None:
    """Forward, backward, forward mode and a second derivative; with several adapters at once too."""
    fn, params, x = LAYOUTS[name]
    params, x = cast((params, x), dtype)
    adapters = adapters_for(fn, params, x, use_dora=dora)
    apply = jlora.lora(fn, materialize="error")

    def loss(adapters: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(apply(jlora.attach(params, adapters), x).astype(jnp.float32)))

    where = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
    several = jax.tree.map(lambda *xs: jnp.stack(xs), adapters, adapters)
    traced = (
        jax.make_jaxpr(jax.grad(loss, where))(adapters, x),
        jax.make_jaxpr(jax.vmap(jax.grad(loss, where), (0, None)))(several, x),
        jax.make_jaxpr(lambda a, t: jax.jvp(jax.grad(lambda a: loss(a, x)), (a,), (t,)))(adapters, adapters),
    )
    found = {(*(v.aval for v in eqn.invars), *eqn.params.values()): eqn for jaxpr in traced for eqn in equations(jaxpr)}
    joined = 0
    for eqn in found.values():
        axes = eqn.params["axes"]
        rng = np.random.default_rng(0)
        operands = [jnp.asarray(rng.normal(size=v.aval.shape), v.aval.dtype) for v in eqn.invars]
        plain = forms._separate(*operands, **eqn.params)
        assert (plain.shape, plain.dtype) == (eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
        if axes.joint is None:
            continue
        joined += 1
        together = forms._joined(*operands, **eqn.params)
        assert (together.shape, together.dtype) == (plain.shape, plain.dtype)
        operands = [*operands[:2], sum(operands[5:], operands[2]), *operands[3:5]]
        wide = [v.astype(jnp.float32) for v in operands]
        exact = forms._separate(*wide, axes=dataclasses.replace(axes, dot=None), dtype=jnp.float32)
        errors = [float(jnp.max(jnp.abs(v.astype(jnp.float32) - exact))) for v in (plain, together)]
        assert errors[1] <= max(1.05 * errors[0], 1e-4), errors
    assert found and (joined or name == "several inputs")


def matrix_axes(x: Any, w: Any) -> forms.AdaptedProduct:
    """Those of ``[rows, inputs] x [inputs, outputs]``."""
    dot = next(e for e in jax.make_jaxpr(jnp.dot)(x, w).eqns if e.primitive.name == "dot_general")
    names = (("x", 0), 0), (0, 1), (("x", 0), RANK_AXIS), (0, RANK_AXIS), (RANK_AXIS, 1), (("x", 0), 1)
    return forms.AdaptedProduct(names, forms.Dot(tuple(dot.params.items()), weight_left=False))


def test_the_joined_form_keeps_an_update_that_the_weight_would_round_away() -> None:
    """In bfloat16, 1 + 2^-10 is 1. Summed over 1024 inputs of alternating signs, the update is the whole result."""
    signs = jnp.where(jnp.arange(1024) % 2, 1.0, -1.0)
    x, w, a, b = signs[None], jnp.ones((1024, 4)), signs[:, None] / 1024, jnp.ones((1, 4))
    x, w, a, b = cast((x, w, a, b), jnp.bfloat16)
    assert jnp.all(w + a @ b == w)
    params: Any = {"axes": matrix_axes(x, w), "dtype": jnp.dtype(jnp.bfloat16)}
    for form in (forms._separate, forms._joined):
        assert jnp.all(form(x, w, x @ a, a, b, **params) == 1)


MAPPED = [axes for axes in itertools.product((None, 0, 1, 2), repeat=4) if any(axis is not None for axis in axes)]


@pytest.mark.parametrize("seed", range(6))
def test_vmap_of_any_operands_along_any_axes(seed: int) -> None:
    """Values, the gradient and forward mode of all operands, against three plain products."""
    rng = np.random.default_rng(seed)
    shapes, in_axes = ((5, 6), (6, 7), (6, 2), (2, 7)), MAPPED[rng.integers(len(MAPPED))]
    x, w, a, b = operands = [
        normal(i + 10 * seed, *(shape if axis is None else (*shape[:axis], 3, *shape[axis:])))
        for i, (shape, axis) in enumerate(zip(shapes, in_axes, strict=True))
    ]
    axes = matrix_axes(*(jnp.zeros(shape) for shape in shapes[:2]))
    ours = lambda x, w, a, b: jnp.sin(forms.adapted_product(x, w, a, b, axes, jnp.float32))  # noqa: E731
    plain = lambda x, w, a, b: jnp.sin(x @ w + (x @ a) @ b)  # noqa: E731

    def everything(fn: Any) -> Any:
        mapped = jax.vmap(fn, in_axes)
        grads = jax.grad(lambda *v: jnp.sum(jnp.square(mapped(*v))), (0, 1, 2, 3))
        return jax.jit(lambda *v: (mapped(*v), grads(*v), jax.jvp(mapped, v, v), jax.jvp(grads, v, v)))(*operands)

    chex.assert_trees_all_close(everything(ours), everything(plain), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("i", range(4), ids="xwab")
def test_the_transpose_in_each_operand(i: int) -> None:
    """`jax.linear_transpose` of the product, without differentiation, in what it is linear in."""
    operands = [normal(k, *shape) for k, shape in enumerate(((5, 6), (6, 7), (6, 2), (2, 7)))]
    axes, ct = matrix_axes(*operands[:2]), normal(9, 5, 7)

    def in_operand(fn: Any) -> Any:
        return lambda v: fn(*operands[:i], v, *operands[i + 1 :])

    ours = in_operand(lambda x, w, a, b: forms.adapted_product(x, w, a, b, axes, jnp.float32))
    plain = in_operand(lambda x, w, a, b: x @ w + (x @ a) @ b)
    chex.assert_trees_all_close(
        jax.linear_transpose(ours, operands[i])(ct), jax.vjp(plain, operands[i])[1](ct), rtol=1e-5, atol=1e-5
    )


def on_a_tpu(fn: Any, *args: Any) -> bool:
    """Whether ``fn`` is lowered to the joined form for a TPU. It is not for a CPU."""
    joined = {
        platform: "stablehlo.concatenate" in jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert not joined["cpu"] and not joined["cuda"]
    return joined["tpu"]


def test_a_tpu_gets_the_joined_form_where_it_pays() -> None:
    """Where the result is wider than the input, or large; not if the compiler divides the program over devices."""

    def product(rows: int, inputs: int, outputs: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
        params = {"w": jax.ShapeDtypeStruct((inputs, outputs), dtype)}
        x = jax.ShapeDtypeStruct((rows, inputs), dtype)
        fn = lambda p, x: x @ p["w"]  # noqa: E731
        config = jlora.LoraConfig(rank=2)
        uses = jlora.trace(fn, params, x)
        adapters = jax.eval_shape(lambda: jlora.init(jax.random.key(0), params, config, uses))
        return lambda p, a, x: jlora.lora(fn)(jlora.attach(p, a), x), params, adapters, x

    assert on_a_tpu(*product(32, 64, 128))
    assert not on_a_tpu(*product(32, 128, 128))
    assert not on_a_tpu(*product(32, 128, 64))
    assert on_a_tpu(*product(2**15, 1024, 512))
    assert not on_a_tpu(*product(2**14, 1024, 512))

    apply, params, adapters, x = product(32, 64, 128)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))

    def placed(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree)

    args = placed((params, adapters), whole)
    assert not on_a_tpu(apply, *args, placed(x, split))
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    by_hand = jax.shard_map(apply, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
    assert on_a_tpu(by_hand, *args, placed(x, split))


def full_width_products(fn: Any, *args: Any) -> int:
    """The products of 32 rows with a weight of 64 x 128 in a gradient: forward, recomputed and backward."""
    text = jax.jit(jax.grad(fn)).lower(*args).compile().as_text() or ""
    return len(re.findall(r"= f32\[(?:32,128|32,64|128,32|64,32)\]\S* (?:dot|custom-call)\(", text))


def test_policies_that_save_dots_recompute_neither_the_product_nor_its_update() -> None:
    """Around the model with `jlora.checkpoint_policy`, and in the model as they are."""
    params = {"w0": normal(1, 64, 128), "w1": normal(2, 128, 64)}
    x, dots = normal(3, 32, 64), jax.checkpoint_policies.dots_saveable

    def fn(p: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jnp.tanh(x @ p["w0"]) @ p["w1"]))

    adapters = adapters_for(fn, params, x)

    def count(apply: Any) -> int:
        return full_width_products(lambda a: apply(jlora.attach(params, a), x), adapters)

    plain = count(jlora.lora(fn))
    assert count(jlora.lora(jax.checkpoint(fn, policy=dots))) == plain
    around = jax.checkpoint(jlora.lora(fn), policy=jlora.checkpoint_policy(dots))
    assert count(around) == plain
    assert count(jlora.lora(jax.checkpoint(fn))) > plain


def test_rank_sized_values_are_saved_under_every_policy() -> None:
    """`x·a` is not computed again in the backward pass."""
    params, x = {"w0": normal(1, 64, 128), "w1": normal(2, 128, 64)}, normal(3, 32, 64)
    fn = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["w0"]) @ p["w1"]))  # noqa: E731
    adapters = adapters_for(fn, params, x)
    for policy in (None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.dots_saveable):
        apply = jlora.lora(jax.checkpoint(fn, policy=policy))
        pullback = jax.vjp(lambda a, apply=apply: apply(jlora.attach(params, a), x), adapters)[1]
        kept = [v.shape for v in jax.tree.leaves(pullback)]
        assert kept.count((32, RANK)) == 2, kept
    # Not where the compiler divides the program over devices.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    pullback = jax.vjp(lambda a: jlora.lora(jax.checkpoint(fn))(jlora.attach(params, a), rows), adapters)[1]
    assert (32, RANK) not in [v.shape for v in jax.tree.leaves(pullback)]
