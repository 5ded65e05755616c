"""How `lora` composes with JAX's transforms: around it and inside the model; and what may be passed through it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.core import Tracer
from jax.experimental import compute_on as places

import jlora
from tests.toys import (
    MLP,
    TOYS,
    adapted_loss,
    adapters_for,
    assert_close,
    assert_law,
    loss_of,
    merged_loss,
    mlp,
    named_mlp,
    stack,
    unstack,
)


@functools.cache
def adapters_of(name: str) -> Any:
    toy = TOYS[name]
    return adapters_for(toy.fn, toy.params, toy.x)


# Around it.


def hessian_vector(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The Hessian times the adapters themselves, as the gradient of a gradient."""

    def slope(adapters: Any, *args: Any) -> Any:
        grads = jax.grad(loss)(adapters, *args)
        return sum(jax.tree.leaves(jax.tree.map(lambda g, a: jnp.vdot(g, lax.stop_gradient(a)), grads, adapters)))

    return jax.grad(slope)


def over_a_stack(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda adapters, *args: jax.vmap(loss, (0, None, None))(stack(adapters, 4), *args)


AROUND: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "value_and_grad": jax.value_and_grad,
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss)),
    "hessian_vector": hessian_vector,
    "vmap_of_grad": lambda loss: over_a_stack(jax.value_and_grad(loss)),
    "grad_of_vmap": lambda loss: jax.grad(lambda *args: over_a_stack(loss)(*args).sum()),
    "scan": lambda loss: lambda a, *args: lax.scan(lambda c, a: (c, loss(a, *args)), 0, stack(a, 4))[1],
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_transform_of_the_adapted_model_is_that_of_the_merged_one(around: Any, name: str) -> None:
    """``T(lora(f))(attach(p, a)) == T(f)(merge(p, a))``, for transforms of the adapters, under jit."""
    toy, adapters = TOYS[name], adapters_of(name)

    def both(*args: Any) -> Any:
        return [around(loss(toy.fn))(*args) for loss in (adapted_loss, merged_loss)]

    assert_close(*jax.jit(both)(adapters, toy.params, toy.x))


def test_without_jit() -> None:
    """No transform needs a jit around it."""
    assert_law(mlp, adapters_of("mlp"), MLP.params, MLP.x, jit=False)


@pytest.mark.parametrize("name", TOYS)
def test_many_adapters_over_one_base(name: str) -> None:
    """vmap over a stacked adapters tree equals a Python loop over the adapters; the base is not copied."""
    toy, adapters = TOYS[name], stack(adapters_of(name), 4)
    apply = jlora.lora(toy.fn, materialize="error")
    run = jax.jit(lambda adapters: apply(jlora.attach(toy.params, adapters), toy.x))
    assert_close(jax.jit(jax.vmap(run))(adapters), jnp.stack([run(a) for a in unstack(adapters, 4)]))


@pytest.mark.parametrize("name", TOYS)
def test_adapters_for_each_example(name: str) -> None:
    """vmap over examples, each with its own adapters, equals a Python loop over the examples."""
    toy, adapters = TOYS[name], stack(adapters_of(name), 4)
    apply = jlora.lora(toy.fn, materialize="error")
    run = jax.jit(lambda adapters, x: apply(jlora.attach(toy.params, adapters), x))
    expected = [run(a, x) for a, x in zip(unstack(adapters, 4), toy.x, strict=False)]
    assert_close(jax.jit(jax.vmap(run))(adapters, toy.x[:4]), jnp.stack(expected))


def test_shapes_alone() -> None:
    """``jax.eval_shape`` gives the base's own result, from attached trees and from shape structs."""
    tree = jlora.attach(MLP.params, adapters_of("mlp"))
    expected = jax.eval_shape(mlp, MLP.params, MLP.x)
    assert jax.eval_shape(jlora.lora(mlp), tree, MLP.x) == expected
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tree, MLP.x))
    assert jax.eval_shape(jlora.lora(mlp), *structs) == expected


@pytest.mark.parametrize("name", TOYS)
def test_export_with_a_batch_of_any_size(name: str) -> None:
    """``jax.export`` with a symbolic number of rows: one program serves all of them."""
    toy, adapters = TOYS[name], adapters_of(name)
    apply = jlora.lora(toy.fn, materialize="error")
    (rows,) = export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, *toy.x.shape[1:]), toy.x.dtype)
    exported = export.export(jax.jit(lambda x: apply(jlora.attach(toy.params, adapters), x)))(x)
    assert_close(exported.call(toy.x[:5]), toy.fn(jlora.merge(toy.params, adapters), toy.x[:5]))


def test_donated_adapters() -> None:
    """A step may donate its adapters; the base is kept."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(adapters: Any, params: Any, x: Any) -> Any:
        return jax.tree.map(lambda a, g: a - g, adapters, jax.grad(adapted_loss(mlp))(adapters, params, x))

    given = jax.tree.map(jnp.copy, adapters_of("mlp"))
    expected = jax.tree.map(lambda a, g: a - g, given, jax.grad(merged_loss(mlp))(given, MLP.params, MLP.x))
    assert_close(step(given, MLP.params, MLP.x), expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert not any(x.is_deleted() for x in jax.tree.leaves(MLP.params))


def test_nested() -> None:
    """A model that calls an adapted model can be adapted again: the updates add up on the same weight."""
    first, second = adapters_of("mlp"), adapters_for(mlp, MLP.params, MLP.x, seed=40)
    inner = jlora.lora(mlp, materialize="error")

    def fixed(params: Any, first: Any, x: Any) -> Any:
        return inner(jlora.attach(params, first), x)

    outer = jlora.lora(fixed, materialize="error")
    run = jax.jit(lambda first, second: outer(jlora.attach(MLP.params, second), first, MLP.x))
    assert_close(run(first, second), mlp(jlora.merge(jlora.merge(MLP.params, first), second), MLP.x))


# Inside the model.


def of_input(params: Any, x: Any) -> Any:
    return jax.grad(lambda x: loss_of(mlp(params, x)))(x)


def one_step(params: Any, x: Any) -> Any:
    """A model that takes a gradient step of its own, in other weights (as in MAML's inner loop)."""
    bias = params["bias"]
    for _ in range(2):
        bias = bias - 0.1 * jax.grad(lambda b: loss_of(mlp(params | {"bias": b}, x)))(bias)
    return mlp(params | {"bias": bias}, x)


def until(params: Any, x: Any) -> Any:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, mlp(params, c[1])), (0, x))[1]


@jax.custom_vjp
def squash(x: Any) -> Any:
    return jnp.tanh(x)


squash.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g * (1 - jnp.tanh(x) ** 2),))


@jax.custom_batching.custom_vmap
def product(x: Any, w: Any) -> Any:
    return x @ w


@product.def_vmap
def _product_of_rows(size: int, batched: Any, x: Any, w: Any) -> Any:
    return 2 * jnp.einsum("bi,io->bo", x, w), True  # twice, so that it shows which of the two ran


def on_host(params: Any, x: Any) -> Any:
    on: Any = getattr(places, "compute_on2", places.compute_on)  # its name before jax 0.11
    first = on(lambda w, x: x @ w, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
    return jnp.tanh(first(params["w0"], x)) @ params["w1"]


INSIDE: dict[str, Callable[[Any, Any], Any]] = {
    "jit": jax.jit(mlp),
    "grad_of_the_input": of_input,
    "grad_of_other_weights": one_step,
    "jvp": lambda p, x: jax.jvp(lambda x: mlp(p, x), (x,), (jnp.cos(x),))[1],
    "linearize": lambda p, x: jax.linearize(lambda x: mlp(p, x), x)[1](jnp.cos(x)),
    "jacfwd": lambda p, x: jax.jacfwd(lambda x: mlp(p, x))(x[0]),
    "vmap": lambda p, x: jax.vmap(lambda x: mlp(p, x))(x),
    "vmap_of_jit": lambda p, x: jax.vmap(jax.jit(mlp), (None, 0))(p, x),
    "map": lambda p, x: lax.map(lambda x: mlp(p, x), x),
    "map_in_batches": lambda p, x: lax.map(lambda x: mlp(p, x), x, batch_size=5),
    "fori_loop": lambda p, x: lax.fori_loop(0, 2, lambda _, h: mlp(p, h), x),
    "associative_scan": lambda p, x: lax.associative_scan(lambda a, b: jnp.tanh(mlp(p, a) + b), x[:4]),
    "cond": lambda p, x: lax.cond(x.sum() > 0, mlp, lambda p, x: 2 * mlp(p, x), p, x),
    "switch": lambda p, x: lax.switch(1, [mlp, lambda p, x: x @ p["w0"] @ p["w1"]], p, x),
    "custom_vjp": lambda p, x: squash(x @ p["w0"]) @ p["w1"],
    "checkpoint_name": named_mlp,
    "compute_on": on_host,
}


@pytest.mark.parametrize("model", INSIDE.values(), ids=INSIDE)
def test_transforms_inside_the_model(model: Any) -> None:
    """A model that uses transforms is adapted without materializing, and has its merged model's gradient."""
    assert_law(model, adapters_of("mlp"), MLP.params, MLP.x)


def test_a_loop_of_unknown_length() -> None:
    """A while loop has no reverse mode in JAX; the adapted model's value is the merged one's."""
    losses = [jax.jit(loss(until))(adapters_of("mlp"), MLP.params, MLP.x) for loss in (adapted_loss, merged_loss)]
    assert_close(*losses)


def test_a_gradient_of_an_adapted_weight_inside_the_model() -> None:
    """A model that differentiates with respect to an adapted weight gets the full gradient: nothing can be factored."""

    def model(params: Any, x: Any) -> Any:
        return x @ jax.grad(lambda w: loss_of(mlp(params | {"w0": w}, x)))(params["w0"])

    assert_law(model, adapters_of("mlp"), MLP.params, MLP.x)


def test_custom_batching_keeps_its_rule_unless_inlined() -> None:
    """A `custom_vmap` function gets the weight materialized, with a warning; under the caller's vmap its own rule runs.
    Inlined, it is factored, and has a gradient, which JAX does not give it otherwise."""

    def model(params: Any, x: Any) -> Any:
        return jnp.tanh(product(x, params["w0"])) @ params["w1"]

    adapters = adapters_of("mlp")
    tree, merged = jlora.attach(MLP.params, adapters), jlora.merge(MLP.params, adapters)
    uses = jlora.trace(model, MLP.params, MLP.x)
    assert uses["w0"].kind == "matmul" and uses["w0"].axes == jlora.Axes()
    for around in (lambda f: f, lambda f: jax.vmap(f, (None, 0))):
        with pytest.warns(jlora.MaterializeWarning, match="own batching rule.*inline_custom_rules=True"):
            got = around(jlora.lora(model))(tree, MLP.x)
        assert_close(got, around(model)(merged, MLP.x))
    inlined = jlora.lora(model, materialize="error", inline_custom_rules=True)
    loss = lambda a: loss_of(inlined(jlora.attach(MLP.params, a), MLP.x))  # noqa: E731
    without = lambda p, x: jnp.tanh(x @ p["w0"]) @ p["w1"]  # noqa: E731
    assert_close(
        jax.value_and_grad(loss)(adapters),
        jax.value_and_grad(lambda a: loss_of(without(jlora.merge(MLP.params, a), MLP.x)))(adapters),
    )


WRITES: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "a row": (lambda w: w.at[0].set(0.0), None),
    "some columns": (lambda w: w.at[:, jnp.array([0, 3])].set(1.0), None),
    "rows out of bounds": (lambda w: w.at[jnp.array([1, 99])].set(0.0), None),
    "a slice": (lambda w: w.at[1:3].set(jnp.arange(16.0)), None),
    "every other row": (lambda w: w.at[::2].set(0.0), None),
    "a row by its index": (lambda w: w.at[jnp.argmax(MLP.x[0])].set(0.0), None),
    "a slice by its place": (lambda w: lax.dynamic_update_slice(w, jnp.ones((2, 16)), (7, 0)), None),
    "a row added to": (lambda w: w.at[0].add(1.0), None),
    "a row multiplied": (lambda w: w.at[0].multiply(3.0), None),
    "columns multiplied, some twice": (
        lambda w: w.at[:, jnp.array([2, 5, 2])].multiply(jnp.array([2.0, 3.0, 4.0])),
        None,
    ),
    "a row multiplied entry by entry": (lambda w: w.at[0].multiply(jnp.arange(16.0)), "at once"),
    "an entry added to": (lambda w: w.at[0, 1].add(1.0), None),
    "an entry": (lambda w: w.at[0, 1].set(0.0), "inputs and outputs at once"),
    "a part of a row": (lambda w: w.at[0, :2].set(0.0), "parts of slices|at once"),
    "the weight written into another": (lambda w: jnp.zeros((8, 20)).at[:, 2:18].set(w)[:, 2:18], "written"),
}


@pytest.mark.parametrize("name", WRITES)
def test_values_written_into_a_weight(name: str) -> None:
    """Writing whole slices along one axis leaves the rest factored, and `trace` follows the weight; any other write is
    reported."""
    write, declined = WRITES[name]

    def model(params: Any, x: Any) -> Any:
        return mlp(params | {"w0": write(params["w0"])}, x)

    adapters = adapters_of("mlp")
    materialized = jlora.explain(model, jlora.attach(MLP.params, adapters), MLP.x).materialized
    use = jlora.trace(model, MLP.params, MLP.x)["w0"]
    assert (use.kind == "matmul" and not use.materialized) == (declined is None) == (not materialized)
    if declined:
        assert re.search(declined, materialized[0].why or ""), materialized
    losses = [lambda a: loss_of(jlora.lora(model, materialize="allow")(jlora.attach(MLP.params, a), MLP.x))]
    losses.append(lambda a: loss_of(model(jlora.merge(MLP.params, a), MLP.x)))
    assert_close(*(jax.jit(jax.value_and_grad(loss))(adapters) for loss in losses))


def test_names_sources_and_places_survive() -> None:
    """Name scopes, source lines, checkpoint names and `compute_on` are those of the bare model."""

    def model(params: Any, x: Any) -> Any:
        with jax.named_scope("encoder"):
            return named_mlp(params, x)

    text = (
        jax.jit(jlora.lora(model)).lower(jlora.attach(MLP.params, adapters_of("mlp")), MLP.x).as_text(debug_info=True)
    )
    assert "encoder/dot_general" in text and "test_transforms.py" in text
    jaxpr = jax.make_jaxpr(jlora.lora(model))(jlora.attach(MLP.params, adapters_of("mlp")), MLP.x)
    assert "name=hidden" in str(jaxpr)
    lowered = jax.jit(jlora.lora(on_host)).lower(jlora.attach(MLP.params, adapters_of("mlp")), MLP.x).as_text()
    on_the_host = [line for line in lowered.splitlines() if "dot_general" in line and '"host"' in line]
    assert len(on_the_host) == 3  # with the base, with a, with b


# What may be passed through.


def test_static_arguments_and_results() -> None:
    """Leaves that are not arrays reach the function, and come back, unchanged."""

    def model(params: Any, x: Any, flag: bool, mode: str, nothing: None, n: int, rate: float, *, act: Any) -> Any:
        assert (flag, mode, nothing, n, rate, act) == (True, "mean", None, 2, 0.5, jnp.tanh)
        assert all(type(v) in (bool, str, int, float) for v in (flag, mode, n, rate))
        y = act(mlp(params, x)) * n * rate if flag else x
        return {"y": y, "mode": mode, "nothing": None, "n": n, "rate": rate, "act": act, "deep": [(y.sum(), "end")]}

    apply = jlora.lora(model, materialize="error")
    args = (MLP.x, True, "mean", None, 2, 0.5)
    adapters = adapters_of("mlp")
    result = apply(jlora.attach(MLP.params, adapters), *args, act=jnp.tanh)
    expected = model(jlora.merge(MLP.params, adapters), *args, act=jnp.tanh)
    for name in ("mode", "nothing", "n", "rate", "act"):
        assert result[name] is expected[name]
    assert result["deep"][0][1] == "end"
    assert_close((result["y"], result["deep"][0][0]), (expected["y"], expected["deep"][0][0]))


def test_keyword_arguments() -> None:
    """Attached trees and arrays may be given by keyword, and the signature stays the function's own."""
    apply = jlora.lora(mlp)
    tree = jlora.attach(MLP.params, adapters_of("mlp"))
    assert_close(apply(x=MLP.x, params=tree), apply(tree, MLP.x))
    assert apply.__name__ == "mlp" and apply.__doc__ == mlp.__doc__


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_random_keys(make_key: Any) -> None:
    """Keys, new and old style, go in and come out; the model draws the same numbers."""

    def model(params: Any, x: Any, key: Any) -> Any:
        return mlp(params, x) + jax.random.normal(key, x.shape), jax.random.split(key)

    adapters, key = adapters_of("mlp"), make_key(1)
    y, keys = jlora.lora(model)(jlora.attach(MLP.params, adapters), MLP.x, key)
    expected, split = model(jlora.merge(MLP.params, adapters), MLP.x, key)
    assert_close(y, expected)
    assert keys.dtype == split.dtype and bool(jnp.all(keys == split))


def test_auxiliary_results() -> None:
    """``has_aux`` works: the auxiliary results may hold leaves that are not arrays."""

    def loss(adapters: Any) -> Any:
        y = jlora.lora(mlp)(jlora.attach(MLP.params, adapters), MLP.x)
        return loss_of(y), {"y": y, "shape": y.shape}

    adapters = adapters_of("mlp")
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
    assert_close((value, grads), jax.value_and_grad(merged_loss(mlp))(adapters, MLP.params, MLP.x))
    assert aux["shape"] == MLP.x.shape


def test_plain_parameters() -> None:
    """Without adapters the wrapped function is the function: the same results, bit for bit, and not traced."""
    seen = []

    def model(params: Any, x: Any) -> Any:
        seen.append(isinstance(x, Tracer))
        return mlp(params, x)

    np.testing.assert_array_equal(jlora.lora(model)(MLP.params, MLP.x), mlp(MLP.params, MLP.x))
    assert seen == [False]


@pytest.mark.parametrize(
    "hide", [jax.checkpoint, jax.jit, lambda fn: lambda p, x: lax.scan(lambda h, _: (fn(p, h), 0), x, None, 2)[0]]
)
def test_a_weight_that_is_passed_on_and_never_read(hide: Any) -> None:
    """A weight that is passed to a call, a rematerialized block or a scan, and not read there, is an error."""
    model = hide(lambda p, x: jnp.tanh(x @ p["w0"] @ p["w0"].T))
    with pytest.raises(ValueError, match="never reads 1 attached.*\n.*'w1'"):
        jlora.lora(model)(jlora.attach(MLP.params, adapters_of("mlp")), MLP.x)


def test_one_warning_for_one_place() -> None:
    """A weight that must be materialized is reported once for each primitive and line, however often they run."""

    def model(params: Any, x: Any) -> Any:
        for _ in range(3):
            x = jnp.tanh(x @ jnp.tanh(params["w0"]) @ params["w1"])
        return x

    tree = jlora.attach(MLP.params, adapters_of("mlp"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(jlora.lora(jax.checkpoint(model)))(tree, MLP.x)
    assert [w.category for w in caught] == [jlora.MaterializeWarning]
