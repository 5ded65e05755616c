"""`lora` on eight emulated devices: shard_map, pmap, and a mesh with Auto axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.toys import (
    FULLY_SHARDED,
    MLP,
    SPLIT,
    TOYS,
    Toy,
    adapted_loss,
    adapters_for,
    assert_close,
    assert_law,
    layer,
    loss_of,
    merged_loss,
    mlp,
    normal,
    stack,
    tensor_parallel,
)

check_vma = pytest.mark.parametrize("check_vma", [True, False])


@functools.cache
def line() -> Mesh:
    return jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))


@functools.cache
def grid() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def mlp_adapters() -> Any:
    return adapters_for(mlp, MLP.params, MLP.x)


@functools.cache
def expected() -> Any:
    """Loss and gradient of the merged model, on one device."""
    return jax.jit(jax.value_and_grad(merged_loss(mlp)))(mlp_adapters(), MLP.params, MLP.x)


# shard_map.


def gathered(params: Any, x: Any) -> Any:
    """`mlp` with its weights gathered for their use, as in fully sharded data parallelism."""
    return mlp({k: lax.all_gather(w, "tensor", tiled=True) for k, w in params.items()}, x)


def with_scan(params: Any, x: Any) -> Any:
    return lax.scan(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable), x, params)[0]


def with_branches(params: Any, x: Any) -> Any:
    return lax.cond(lax.axis_index("tensor") < 3, mlp, lambda p, x: mlp(p, 2 * x), params, x)


def own_experts(params: Any, x: Any) -> Any:
    """Every device has one expert, and all the rows."""
    return lax.psum(jnp.einsum("bi,eio->ebo", x, params["experts"]), "tensor")[0]


def varied(params: Any, x: Any) -> Any:
    """`mlp` with weights cast to vary; without ``check_vma`` nothing is known to vary, and the casts do nothing."""
    vary = jax.typeof(x).mat.varying
    return mlp({k: lax.pcast(w, "tensor", to="varying") if vary else w for k, w in params.items()}, x)


EXPERTS = {"experts": normal(30, 8, 8, 8)}
SHARDED: dict[str, tuple[Callable[..., Any], Any, Any, Any, Any]] = {
    "data": (mlp, MLP.params, P(), P("tensor"), P("tensor")),
    "tensor": (tensor_parallel, MLP.params, SPLIT, P(), P()),
    "gathered": (gathered, MLP.params, P("tensor"), P("tensor"), P("tensor")),
    "scan": (with_scan, TOYS["stacked"].params, P(), P("tensor"), P("tensor")),
    "cond": (with_branches, MLP.params, P(), P("tensor"), P("tensor")),
    "experts": (own_experts, EXPERTS, P("tensor"), P(), P()),
    "lookup": (
        lambda p, x: jnp.tanh(p["w0"][jnp.argsort(x[:, 0])]) @ p["w1"],
        MLP.params,
        P(),
        P("tensor"),
        P("tensor"),
    ),
    "varied": (varied, MLP.params, P(), P("tensor"), P("tensor")),
}


@check_vma
@pytest.mark.parametrize("name", SHARDED)
def test_shard_map_inside_the_model(name: str, check_vma: bool) -> None:
    """The factors are sharded as their weight; losses and gradients of replicated adapters are the merged model's."""
    fn, params, places, rows, out = SHARDED[name]
    model = jax.shard_map(fn, mesh=line(), in_specs=(places, rows), out_specs=out, check_vma=check_vma)
    if "w0" in params:
        adapters = mlp_adapters()
    else:
        toy = TOYS["stacked"] if name == "scan" else Toy(lambda p, x: x @ p["experts"], EXPERTS, MLP.x)
        adapters = adapters_for(toy.fn, toy.params, toy.x)
    assert_law(model, adapters, params, MLP.x)


def test_trace_looks_into_shard_map() -> None:
    """The axes of a weight are those that the devices' shards of it have."""
    model = jax.shard_map(gathered, mesh=line(), in_specs=(P("tensor"), P("tensor")), out_specs=P("tensor"))
    uses = jlora.trace(model, MLP.params, MLP.x)
    assert [uses[k].axes for k in ("w0", "w1")] == [jlora.Axes((), (0,), (1,))] * 2


def test_partly_manual_shard_map() -> None:
    """A mesh axis that shard_map leaves to the partitioner stays automatic."""
    model = jax.shard_map(mlp, mesh=grid(), in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"})
    params = placed(MLP.params, grid(), SPLIT)
    assert_law(model, placed(mlp_adapters(), grid(), P()), params, placed(MLP.x, grid(), P("data")))


@check_vma
def test_data_parallel_inside_shard_map(check_vma: bool) -> None:
    """A step written for one device's rows, adapters replicated: loss and gradient are the single-device ones."""

    @functools.partial(jax.shard_map, mesh=line(), in_specs=(P(), P(), P("tensor")), out_specs=P(), check_vma=check_vma)
    def step(adapters: Any, params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(adapted_loss(mlp))(adapters, params, x)
        # With check_vma, JAX has summed the gradient of what is the same on every device.
        grads = jax.tree.map(lambda g: g / 8, grads) if check_vma else lax.pmean(grads, "tensor")
        return lax.pmean(value, "tensor"), grads

    assert_close(jax.jit(step)(mlp_adapters(), MLP.params, MLP.x), expected())


@check_vma
def test_tensor_parallel_inside_shard_map(check_vma: bool) -> None:
    """Shards of weights, attached inside with shards of their factors, sum to the whole model's loss and gradient."""
    adapters = mlp_adapters()
    places = {
        "w0": dataclasses.replace(adapters["w0"], a=P(), b=P(None, "tensor")),
        "w1": dataclasses.replace(adapters["w1"], a=P("tensor"), b=P()),
    }
    apply = jlora.lora(tensor_parallel, materialize="error")

    @functools.partial(jax.shard_map, mesh=line(), in_specs=(places, SPLIT, P()), out_specs=P(), check_vma=check_vma)
    def sharded(adapters: Any, params: Any, x: Any) -> Any:
        return apply(jlora.attach(params, adapters), x)

    loss = lambda *args: loss_of(sharded(*args))  # noqa: E731
    assert_close(jax.jit(jax.value_and_grad(loss))(adapters, MLP.params, MLP.x), expected())


SPLIT_FACTORS = {"w0": (P(), P(None, "tensor"), P("tensor")), "w1": (P("tensor"), P(), P())}
"""Where a, b and the magnitude of the weights of `SPLIT` are."""


def places_of(adapters: Any, magnitude: Any = None) -> Any:
    """The specs of DoRA adapters of `tensor_parallel`; ``magnitude`` for all of them, if given."""
    return {
        path: dataclasses.replace(f, a=a, b=b, magnitude=magnitude or m)
        for (path, f), (a, b, m) in zip(adapters.items(), SPLIT_FACTORS.values(), strict=True)
    }


@pytest.mark.parametrize("declared", [None, {"w1": "tensor"}, {"w1": ("tensor",)}], ids=str)
@check_vma
def test_dora_of_weights_split_on_their_inputs(check_vma: bool, declared: Any) -> None:
    """Attached inside shard_map, DoRA's norm is the whole weight's, or an error that says what it needs."""
    adapters = adapters_for(mlp, MLP.params, MLP.x, use_dora=True)
    apply, places = jlora.lora(tensor_parallel, materialize="error"), places_of(adapters)

    @functools.partial(jax.shard_map, mesh=line(), in_specs=(places, SPLIT, P()), out_specs=P(), check_vma=check_vma)
    def sharded(adapters: Any, params: Any, x: Any) -> Any:
        return apply(jlora.attach(params, adapters, split_inputs=declared), x)

    step = jax.jit(jax.value_and_grad(lambda *args: loss_of(sharded(*args))))
    if not check_vma and declared is None:
        with pytest.raises(ValueError, match=r"'w0'.*'tensor'.*check_vma=False.*split_inputs=\{'w0': 'tensor'\}"):
            step(adapters, MLP.params, MLP.x)
        return
    assert_close(step(adapters, MLP.params, MLP.x), jax.value_and_grad(merged_loss(mlp))(adapters, MLP.params, MLP.x))


@pytest.mark.parametrize("cast", ["both vary", "neither varies"])
def test_dora_is_refused_where_types_do_not_tell_which_axes_are_split(cast: str) -> None:
    """Factors that all vary over the devices, or weights that vary alone; declared, both are right."""
    adapters = adapters_for(mlp, MLP.params, MLP.x, use_dora=True)
    split = cast == "both vary"
    places, weights = (places_of(adapters), SPLIT) if split else (P(), P())

    @functools.partial(jax.shard_map, mesh=line(), in_specs=(places, weights, P()), out_specs=P("tensor"))
    def sharded(adapters: Any, params: Any, x: Any) -> Any:
        vary = lambda tree: jax.tree.map(  # noqa: E731
            lambda v: v if "tensor" in jax.typeof(v).mat.varying else lax.pcast(v, "tensor", to="varying"), tree
        )
        adapters, params = (vary(adapters), params) if split else (adapters, vary(params))
        tree = jlora.attach(params, adapters, split_inputs=declared)
        y = jlora.lora(mlp, materialize="error")(tree, x)
        return lax.psum(y, "tensor")[None] if split else y[None]

    declared: Any = None
    with pytest.raises(ValueError, match=f"{cast} with it"):
        sharded(adapters, MLP.params, MLP.x)
    declared = {"w1": "tensor"} if split else {}
    assert_close(sharded(adapters, MLP.params, MLP.x)[0], mlp(jlora.merge(MLP.params, adapters), MLP.x))


def test_dora_under_pmap_needs_to_know() -> None:
    """pmap records no types: what is not split is declared; `init` and `merge` belong outside."""
    adapters = adapters_for(mlp, MLP.params, MLP.x, use_dora=True)

    def apply(params: Any, x: Any, **options: Any) -> Any:
        return jlora.lora(mlp)(jlora.attach(params, adapters, **options), x)

    rows = MLP.x.reshape(8, 2, 8)
    with pytest.raises(ValueError, match="jax.pmap"):
        jax.pmap(apply, "rows", in_axes=(None, 0))(MLP.params, rows)
    got = jax.pmap(functools.partial(apply, split_inputs={}), "rows", in_axes=(None, 0))(MLP.params, rows)
    assert_close(got.reshape(16, 8), mlp(jlora.merge(MLP.params, adapters), MLP.x))
    config = jlora.LoraConfig(rank=2, targets=("w0",), use_dora=True)
    init = lambda params, _: jlora.init(jax.random.key(0), params, config)  # noqa: E731
    for inside in (lambda params, x: jlora.merge(params, adapters), init):
        with pytest.raises(ValueError, match="outside of the mapped function"):
            jax.pmap(inside, "rows", in_axes=(None, 0))(MLP.params, rows)
    with pytest.raises(KeyError, match="split_inputs has paths without factors"):
        jlora.attach(MLP.params, adapters, split_inputs={"w2": "rows"})


def test_an_attached_tree_through_shard_map() -> None:
    """An attached tree is a pytree: shard_map of the adapted model takes it as it is."""
    apply = jax.shard_map(jlora.lora(mlp), mesh=line(), in_specs=(P(), P("tensor")), out_specs=P("tensor"))
    result = jax.jit(apply)(jlora.attach(MLP.params, mlp_adapters()), MLP.x)
    assert_close(result, mlp(jlora.merge(MLP.params, mlp_adapters()), MLP.x))


# pmap.


def test_pmap_of_the_adapted_model() -> None:
    """``pmap`` of a step over the devices' rows gives the single-device loss and gradient on every device."""

    def step(adapters: Any, params: Any, x: Any) -> Any:
        return lax.pmean(jax.value_and_grad(adapted_loss(mlp))(adapters, params, x), "rows")

    results = jax.pmap(step, "rows", in_axes=(None, None, 0))(mlp_adapters(), MLP.params, MLP.x.reshape(8, 2, 8))
    for i in (0, 7):
        assert_close(jax.tree.map(lambda x, i=i: x[i], results), expected())


def test_pmap_over_adapters() -> None:
    """Eight adapters of one base, one per device, are trained as they would be one by one."""
    adapters = stack(mlp_adapters(), 8)
    step = jax.value_and_grad(adapted_loss(mlp))
    results = jax.pmap(step, in_axes=(0, None, None))(adapters, MLP.params, MLP.x)
    assert_close(results, jax.vmap(jax.value_and_grad(merged_loss(mlp)), (0, None, None))(adapters, MLP.params, MLP.x))


@pytest.mark.parametrize("stacked_weights", [False, True])
def test_pmap_inside_the_model(stacked_weights: bool) -> None:
    """A model that is itself a ``pmap`` over its rows, or over its stacked weights, is adapted, not materialized."""
    if stacked_weights:
        params = EXPERTS
        model = lambda p, x: jax.pmap(lambda w, x: jnp.tanh(x) @ w)(p["experts"], x)  # noqa: E731
    else:
        params = MLP.params
        model = lambda p, x: jax.pmap(mlp, in_axes=(None, 0))(p, x)  # noqa: E731
    x = MLP.x.reshape(8, 2, 8)
    assert_law(model, adapters_for(model, params, x), params, x, jit=False)


# Auto mesh: the partitioner decides.


def placed(tree: Any, mesh: Mesh, places: Any) -> Any:
    return jax.device_put(
        tree, jax.tree.map(lambda p: NamedSharding(mesh, p), places, is_leaf=lambda p: isinstance(p, P))
    )


def constrained(params: Any, x: Any) -> Any:
    mesh = grid()
    w0 = lax.with_sharding_constraint(params["w0"], NamedSharding(mesh, P(None, "tensor")))
    hidden = lax.with_sharding_constraint(x @ w0 + params["bias"], NamedSharding(mesh, P("data", "tensor")))
    return jnp.tanh(hidden) @ params["w1"]


def with_shardings(params: Any, x: Any) -> Any:
    """A nested jit with shardings for some of its arguments and results, which returns a weight unchanged."""
    mesh = grid()
    at = functools.partial(NamedSharding, mesh)

    @functools.partial(jax.jit, in_shardings=({"w0": at(P(None, "tensor")), "bias": None, "w1": None}, at(P("data"))))
    def first(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w0"] + params["bias"])

    turned = jax.jit(lambda w: w.T, out_shardings=at(P("data", "tensor")))(params["w1"])
    return jax.jit(lambda h, w: h @ w.T, out_shardings=at(P("data")))(first(params, x), turned)


@pytest.mark.parametrize("model", [mlp, constrained, with_shardings])
def test_auto_mesh(model: Any) -> None:
    """A fully sharded base with replicated adapters, and rows over "data": the merged model's loss and gradient."""
    mesh = grid()
    params, x = placed(MLP.params, mesh, FULLY_SHARDED), placed(MLP.x, mesh, P("data"))
    assert_law(model, placed(mlp_adapters(), mesh, P()), params, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_stays_what_and_where_it_is(dtype: str) -> None:
    """Through steps over a whole attached tree, and a merge, every leaf keeps its dtype and its sharding."""
    mesh = grid()
    params = placed(jax.tree.map(lambda x: x.astype(dtype), MLP.params), mesh, FULLY_SHARDED)
    tree, x = jlora.attach(params, placed(mlp_adapters(), mesh, P())), placed(MLP.x.astype(dtype), mesh, P("data"))
    tx, apply = jlora.freeze(optax.adam(1e-2)), jlora.lora(mlp)

    @jax.jit
    def step(tree: Any, state: Any, x: Any) -> Any:
        trainable, frozen = jlora.partition(tree)
        grads = jax.grad(lambda t: loss_of(apply(jlora.combine(t, frozen), x)))(trainable)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    trained, _ = step(tree, tx.init(tree), x)
    kept, adapters = jlora.detach(trained)
    assert jax.tree.all(jax.tree.map(lambda new, old: bool(jnp.all(new == old)), kept, params))
    for after in (kept, jax.jit(jlora.merge)(params, adapters)):
        for name, leaf in params.items():
            assert after[name].dtype == leaf.dtype
            assert after[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert apply(trained, x).dtype == mlp(params, x).dtype
