"""Forward mode, and derivatives of any order, of the adapted model: they are those of the merged one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import _measure
from tests.toys import MLP, SPLIT, TOYS, Toy, adapted_loss, adapters_for, loss_of, merged_loss, mlp, normal
from train.compute import flops


def conv(params: Any, x: Any) -> Any:
    """A grouped convolution with a stride, and a pointwise one."""
    numbers = ("NWC", "WIO", "NWC")
    h = jnp.tanh(
        lax.conv_general_dilated(x, params["k"], (2,), "SAME", dimension_numbers=numbers, feature_group_count=2)
    )
    return lax.conv_general_dilated(h, params["p"], (1,), "VALID", dimension_numbers=numbers)


def heads(params: Any, x: Any) -> Any:
    """Attention's projections: axes between batch and features, and a weight that is used on the left."""
    q = jnp.einsum("bti,ihd->bhtd", x, params["q"])
    return jnp.sin(jnp.einsum("bhtd,hdo->bto", q, params["o"])) + jnp.einsum("io,bti->bot", params["l"], x).mT


def ragged(params: Any, x: Any) -> Any:
    return jnp.sin(lax.ragged_dot(x, params["w"], jnp.array([4, 0, 5, 1])))


def rematerialized(params: Any, x: Any) -> Any:
    policy = jax.checkpoint_policies.dots_saveable
    return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None), policy=policy), x, params["w"])[0]


HEADS = {"q": normal(1, 8, 4, 5), "o": normal(2, 4, 5, 8), "l": normal(3, 8, 8)}
CASES: dict[str, tuple[Toy, dict[str, Any]]] = {
    **{name: (toy, {}) for name, toy in TOYS.items()},
    "convolution": (Toy(conv, {"k": normal(1, 5, 2, 6), "p": normal(2, 1, 6, 7)}, normal(3, 2, 6, 4)), {}),
    "heads": (Toy(heads, HEADS, normal(4, 2, 6, 8)), {}),
    "remat": (Toy(rematerialized, {"w": normal(1, 2, 8, 8)}, normal(2, 6, 8)), {}),
    "dora": (MLP, {"use_dora": True}),
    "dora, lookup": (TOYS["tied"], {"use_dora": True}),
    "dora, stacked": (TOYS["stacked"], {"use_dora": True}),
}


RAGGED = Toy(ragged, {"w": normal(1, 4, 8, 7)}, normal(2, 10, 8))
"""JAX has no `vmap` for the derivative of a ragged product."""


def setup(name: str) -> tuple[Toy, Any, Any]:
    """A case, its adapters, and a tangent for them."""
    toy, options = (CASES | {"ragged": (RAGGED, {})})[name]
    adapters = adapters_for(toy.fn, toy.params, toy.x, **options)
    return toy, adapters, tangents_of(adapters)


def agree(actual: Any, expected: Any) -> None:
    """The same up to 1e-5 of each array's largest entry, or of 1."""

    def close(x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))

    jax.tree.map(close, jax.device_get(actual), jax.device_get(expected))


def tangents_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype) + a.size).reshape(a.shape) / 4, tree)


def derivatives(f: Callable[[Any], Any], at: Any, along: Any) -> dict[str, Any]:
    """Every mode of JAX, and their compositions, of ``f`` of a pytree; dense ones along two directions."""
    other = jax.tree.map(jnp.sin, at)

    def plane(s: Any) -> Any:
        return f(jax.tree.map(lambda a, t, u: a + s[0] * t + s[1] * u, at, along, other))

    def push(along: Any) -> Any:
        return jax.jvp(f, (at,), (along,))

    def slope(at: Any) -> Any:
        return jax.jvp(f, (at,), (along,))[1]

    many = jax.tree.map(lambda t: jnp.stack([t, 2 * t, jnp.sin(t)]), along)
    points = jax.tree.map(lambda a, t: jnp.stack([a, a + t]), at, along)
    return {
        "jvp": push(along),
        "linearize": jax.linearize(f, at)[1](along),
        "jacfwd": jax.jacfwd(plane)(jnp.zeros(2)),
        "hessian": jax.hessian(plane)(jnp.zeros(2)),
        "vmap of jvp": jax.vmap(push)(many),
        "jvp of vmap": jax.jvp(jax.vmap(f), (points,), (jax.tree.map(jnp.sin, points),)),
        "grad of jvp": jax.grad(slope)(at),
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_merged_model(name: str) -> None:
    """With respect to the adapters, under jit; and with a jit of the adapted model inside."""
    toy, adapters, along = setup(name)

    @jax.jit
    def both(adapters: Any, along: Any) -> Any:
        inner = jax.jit(adapted_loss(toy.fn))
        losses = (adapted_loss(toy.fn), merged_loss(toy.fn), inner)
        *pair, jitted = [lambda a, loss=loss: loss(a, toy.params, toy.x) for loss in losses]
        return [derivatives(f, adapters, along) for f in pair], jax.jvp(jitted, (adapters,), (along,))

    (adapted, merged), jitted = both(adapters, along)
    agree(adapted, merged)
    agree(jitted, merged["jvp"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["mlp", "stacked", "convolution", "dora, lookup", "ragged"])
def test_without_jit_around(name: str) -> None:
    """jvp, linearize and jvp of grad outside of jit, of a function that may be jitted itself."""
    toy, adapters, along = setup(name)
    merged = jax.jit(lambda a: merged_loss(toy.fn)(a, toy.params, toy.x))
    for wrap in (lambda f: f, jax.jit):
        adapted = wrap(lambda a: adapted_loss(toy.fn)(a, toy.params, toy.x))
        agree(jax.jvp(adapted, (adapters,), (along,)), jax.jvp(merged, (adapters,), (along,)))
        agree(jax.linearize(adapted, adapters)[1](along), jax.linearize(merged, adapters)[1](along))
        pushed = [jax.jvp(jax.grad(f), (adapters,), (along,)) for f in (adapted, merged)]
        agree(*pushed)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["mlp", "heads", "convolution", "remat", "dora"])
def test_the_jacobian_in_the_inputs(name: str) -> None:
    """jacfwd, jacrev and the Hessian of a loss, with respect to arguments other than the adapters."""
    toy, adapters, _ = setup(name)
    tree, merged = jlora.attach(toy.params, adapters), jlora.merge(toy.params, adapters)
    apply = jlora.lora(toy.fn, materialize="error")

    def both(x: Any) -> Any:
        def modes(f: Callable[[Any], Any]) -> Any:
            one = lambda v: f(x + v * jnp.sin(jnp.arange(x.size)).reshape(x.shape))  # noqa: E731
            pair = lambda v: loss_of(f(x * v[0] + jnp.sin(x) * v[1]))  # noqa: E731
            return jax.jacfwd(one)(0.0), jax.jacrev(pair)(jnp.ones(2)), jax.hessian(pair)(jnp.ones(2))

        return modes(lambda x: apply(tree, x)), modes(lambda x: toy.fn(merged, x))

    agree(*jax.jit(both)(toy.x))


@pytest.mark.parametrize("name", ["mlp", "tied", "stacked", "convolution", "dora"])
def test_tangents_of_frozen_leaves(name: str) -> None:
    """They count as zero by default, as the gradients are; with ``frozen_gradients`` they are the merged model's."""
    toy, adapters, along = setup(name)
    pushed = tangents_of(toy.params)

    def push(push_base: bool, **options: Any) -> Any:
        apply = jlora.lora(toy.fn, materialize="error", **options)
        primal, tangent = jlora.attach(toy.params, adapters), jlora.attach(pushed, along)
        if not push_base:
            tangent = jlora.attach(jax.tree.map(jnp.zeros_like, pushed), along)
        return jax.jvp(lambda tree: loss_of(apply(tree, toy.x)), (primal,), (tangent,))

    def merged(params: Any, adapters: Any) -> Any:
        return merged_loss(toy.fn)(adapters, params, toy.x)

    alone = jax.jvp(lambda a: merged(toy.params, a), (adapters,), (along,))
    whole = jax.jvp(merged, (toy.params, adapters), (pushed, along))
    agree([push(True), push(False)], [alone, alone])
    agree([push(True, frozen_gradients=True), push(False, frozen_gradients=True)], [whole, alone])
    assert not np.allclose(whole[1], alone[1], rtol=1e-3)


def test_inside_the_model_too() -> None:
    """A model that computes tangents itself, differentiated in either mode."""
    adapters = adapters_for(mlp, MLP.params, MLP.x)

    def model(params: Any, x: Any) -> Any:
        return jax.jvp(lambda x: mlp(params, x), (x,), (jnp.cos(x),))

    along = tangents_of(adapters)
    losses = [lambda a, loss=loss: loss(model)(a, MLP.params, MLP.x) for loss in (adapted_loss, merged_loss)]
    agree(*[(jax.jvp(f, (adapters,), (along,)), jax.jacrev(f)(adapters)) for f in losses])


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_narrow_activations(factors: str, promotion: str) -> None:
    """bfloat16 products: tangents have their value's dtype, gradients the factors', and both their digits. The
    gradient of a float32 factor is summed in float32, and not rounded to bfloat16."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, dx = (jax.random.normal(k, (2, 8, 16)).astype("bfloat16") for k in keys[:2])
    shapes = ((16, 4), (4, 12), (16, 4), (4, 12))
    a, b, da, db = (jax.random.normal(k, s).astype("bfloat16") for k, s in zip(keys[2:], shapes, strict=True))
    narrow = (x, a.astype(factors), b.astype(factors)), (dx, da.astype(factors), db.astype(factors))

    def pushed(x: Any, a: Any, b: Any) -> Any:
        return jax.jvp(jlora.low_rank_product, (x, a, b), narrow[1])

    with jax.numpy_dtype_promotion(promotion):
        y, dy = jax.jit(pushed)(*narrow[0])
        _, pull = jax.vjp(jlora.low_rank_product, *narrow[0])
        grads = pull(jnp.ones_like(y))
    assert y.dtype == dy.dtype == jnp.bfloat16
    assert [g.dtype for g in grads] == ["bfloat16", factors, factors]
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), narrow)
    (x, a, b), (dx, da, db) = wide
    expected = dx @ a @ b + x @ da @ b + x @ a @ db
    np.testing.assert_allclose(np.asarray(dy, np.float64), expected, atol=0.02 * np.abs(expected).max())
    hidden = np.asarray(jnp.asarray(x @ a, jnp.float32).astype("bfloat16"), np.float64)
    exact = hidden.sum((0, 1))[:, None] * np.ones(12)  # of b: the sum of rounded hidden features
    digits = 1e-3 if factors == "float32" else 8e-3
    np.testing.assert_allclose(np.asarray(grads[2], np.float64), exact, atol=digits * np.abs(exact).max())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind: Any) -> None:
    """Weights and rows split over devices, with a mapped axis too; and inside shard_map."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    adapters = adapters_for(mlp, MLP.params, MLP.x)
    along = tangents_of(adapters)
    many = jax.tree.map(lambda t: jnp.stack([t, jnp.sin(t)]), along)
    params = {k: jax.device_put(w, NamedSharding(mesh, SPLIT[k])) for k, w in MLP.params.items()}
    x = jax.device_put(MLP.x, NamedSharding(mesh, P("data", None)))

    def model(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["w0"] + params["bias"])
        if kind == AxisType.Explicit:
            return jnp.einsum("bi,io->bo", hidden, params["w1"], out_sharding=P("data", None))
        return hidden @ params["w1"]

    apply = jlora.lora(model, materialize="error")

    def modes(f: Callable[[Any], Any]) -> Any:
        return (
            jax.jvp(f, (adapters,), (along,)),
            jax.jvp(jax.grad(lambda a: f(a).sum()), (adapters,), (along,)),
            jax.vmap(lambda t: jax.jvp(f, (adapters,), (t,))[1])(many),
        )

    expected = jax.jit(lambda: modes(lambda a: jnp.sin(mlp(jlora.merge(MLP.params, a), MLP.x))))()
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params, x: modes(lambda a: jnp.sin(apply(jlora.attach(params, a), x))))(params, x)
        agree(found, expected)
        if kind == AxisType.Explicit:  # a mapped axis that is split
            rows = jax.device_put(MLP.x.reshape(4, 4, 8), NamedSharding(mesh, P("data", None, None)))
            tree = jlora.attach({"w0": MLP.params["w0"]}, {"w0": adapters["w0"]})
            product = jlora.lora(lambda p, x: jnp.sin(x @ p["w0"]), materialize="error")
            mapped = lambda tree: jax.vmap(product, (None, 0))(tree, rows)  # noqa: E731
            push = lambda f: jax.jit(lambda t: jax.jvp(f, (t,), (tangents_of(t),)))(tree)  # noqa: E731
            plain = lambda t: jnp.sin(MLP.x.reshape(4, 4, 8) @ jlora.merge(*jlora.detach(t))["w0"])  # noqa: E731
            agree(push(mapped)[1], jax.jvp(plain, (tree,), (_frozen(tangents_of(tree)),))[1])

    if kind == AxisType.Auto:
        mapped = jax.shard_map(
            lambda a, x: lax.psum(jnp.sin(apply(jlora.attach(MLP.params, a), x)).sum(), "data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        merged = lambda a: jnp.sin(mlp(jlora.merge(MLP.params, a), MLP.x)).sum()  # noqa: E731
        pushed = [
            jax.jit(lambda a, f=f: (jax.jvp(f, (a,), (along,)), jax.jvp(jax.grad(f), (a,), (along,))))(adapters)
            for f in (lambda a: mapped(a, MLP.x), merged)
        ]
        agree(*pushed)


def _frozen(tree: Any) -> Any:
    """Tangents that are zero for the bases."""
    is_weight = lambda leaf: isinstance(leaf, jlora.LoraWeight)  # noqa: E731
    return jax.tree.map(lambda w: dataclasses.replace(w, base=jnp.zeros_like(w.base)), tree, is_leaf=is_weight)


def test_what_forward_mode_costs() -> None:
    """Of one factored layer: one more product with the base for what is before it, six low-rank ones, and no matmul of
    a weight's shape; its count by the trainer's `flops` is what one counts by hand."""
    rows, inputs, width, rank = 50, 16, 24, 3
    params = {"w": normal(0, inputs, width)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = normal(1, rows, inputs)
    adapters = adapters_for(fn, params, x)
    apply = jlora.lora(fn, materialize="error")

    def push(a: Any, x: Any) -> Any:
        return jax.jvp(lambda a, x: apply(jlora.attach(params, a), x), (a, x), (tangents_of(a), jnp.sin(x)))

    narrow = 2 * rows * rank * (inputs + width)
    assert flops.count(push, adapters, x) == 2 * (2 * rows * inputs * width) + 3 * narrow
    assert _measure.weight_shaped_dots(_measure.compile_program(push, adapters, x).text, [(inputs, width)]) == 0


def test_a_models_own_custom_vjp_keeps_jaxs_word() -> None:
    """A function of the model that has no forward mode has none after `lora` either, and JAX says so."""

    @jax.custom_vjp
    def squash(x: Any) -> Any:
        return jnp.tanh(x)

    squash.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
    fn = lambda p, x: squash(x @ p["w0"]) @ p["w1"]  # noqa: E731
    params = {name: MLP.params[name] for name in ("w0", "w1")}
    adapters = adapters_for(fn, params, MLP.x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda a: adapted_loss(fn)(a, params, MLP.x), (adapters,), (tangents_of(adapters),))
