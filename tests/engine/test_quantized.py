"""Quantized leaves: computed as the dequantized weights, adapted or not, in any layout; and never kept."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Axes, LoraConfig, LoraFactors, QuantizedArray
from jlora._src.quantized import DYNAMIC, NF4

SCHEMES = ("int8", "nf4", "double")


def quantized(w: Any, scheme: str, axis: int = -2, block: int = 8) -> QuantizedArray:
    """A weight in few bits, each scale for a block along ``axis``."""
    axis %= w.ndim
    block = block if w.shape[axis] % block == 0 else w.shape[axis]
    blocks = jnp.moveaxis(w, axis, -1).reshape(*np.delete(w.shape, axis), -1, block).astype(jnp.float32)
    scales = jnp.max(jnp.abs(blocks), -1) + 1e-6

    def back(x: Any) -> Any:
        return jnp.moveaxis(x, -1, axis)

    if scheme == "int8":
        codes = jnp.round(blocks / scales[..., None] * 127).astype(jnp.int8)
        codes = back(codes.reshape(*scales.shape[:-1], -1))
        return QuantizedArray(codes, back(scales / 127), None, None, scheme, w.dtype)
    values = jnp.asarray(NF4)
    codes = jnp.argmin(jnp.abs((blocks / scales[..., None])[..., None] - values), -1).astype(jnp.uint4)
    codes = back(codes.reshape(*scales.shape[:-1], -1))
    if scheme == "nf4":
        return QuantizedArray(codes, back(scales), None, None, "nf4", w.dtype)
    offset = jnp.mean(scales, (-2, -1), keepdims=True)
    groups = jnp.max(jnp.abs(scales - offset), -2, keepdims=True) + 1e-6
    coded = jnp.argmin(jnp.abs(((scales - offset) / groups)[..., None] - DYNAMIC), -1).astype(jnp.uint8)
    return QuantizedArray(codes, back(coded), back(groups), back(offset), "nf4", w.dtype)


def dequantized(tree: Any) -> Any:
    leaves, treedef = jlora.named_leaves(tree)
    return treedef.unflatten([x.dequantize() if isinstance(x, QuantizedArray) else x for x in leaves.values()])


def moved(adapters: Any) -> Any:
    """Adapters with a nonzero update."""
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), adapters)


def assert_equal(got: Any, want: Any, tolerance: float = 1e-6) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.float32(x), np.float32(y)
        np.testing.assert_allclose(x, y, atol=tolerance * float(np.abs(y).max() + 1e-9))


# How weights are consumed: (function of w and x, shape of w, shape of x)
USES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "dense": (lambda w, x: x @ w, (16, 12), (3, 16)),
    "left": (lambda w, x: w @ x, (12, 16), (16, 3)),
    "transposed": (lambda w, x: x @ w.T, (12, 16), (3, 16)),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (16, 2, 6), (3, 16)),
    "from heads": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 8, 12), (3, 2, 8)),
    "reshaped": (lambda w, x: x @ w.reshape(16, 12), (2, 8, 12), (3, 16)),
    "experts": (lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (4, 16, 12), (4, 3, 16)),
    "convolution": (lambda w, x: jax.lax.conv(x, w.transpose(2, 1, 0), (1,), "SAME"), (3, 8, 12), (2, 8, 6)),
    "layers": (lambda w, x: jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)[0], (3, 16, 16), (3, 16)),
    "layers in a loop": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x), (3, 16, 16), (3, 16),
    ),
    "remat": (jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), (16, 12), (3, 16)),
    "jitted": (jax.jit(lambda w, x: x @ w), (16, 12), (3, 16)),
    "branch": (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda v: x @ v, lambda v: -x @ v, w), (16, 12), (3, 16)),
    "sliced": (lambda w, x: x[:, :8] @ w[:8, 3:9], (16, 12), (3, 16)),
    "cut through a block": (lambda w, x: x[:, :9] @ w[3:12], (16, 12), (3, 16)),
    "split": (lambda w, x: sum(x @ v for v in jnp.split(w, 3, axis=1)), (16, 12), (3, 16)),
    "cast": (lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), (16, 12), (3, 16)),
    "scaled": (lambda w, x: x @ (w * 0.5), (16, 12), (3, 16)),
    "normalized": (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), (16, 12), (3, 16)),
    "joined": (lambda w, x: x @ jnp.concatenate([w, w], 1), (16, 12), (3, 16)),
    "padded": (lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 3))), (16, 12), (3, 16)),
    "elementwise": (lambda w, x: x + jnp.tanh(w).sum(1), (16, 12), (3, 16)),
    "returned": (lambda w, x: (x @ w, w), (16, 12), (3, 16)),
}  # fmt: skip


@pytest.mark.sampled(14)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", USES)
def test_a_quantized_weight_computes_as_the_dequantized_one(name, scheme):
    """Alone, adapted, and with DoRA; the result and every gradient."""
    fn, shape, x_shape = USES[name]
    x = jax.random.normal(jax.random.key(1), x_shape)
    w = jax.random.normal(jax.random.key(0), shape)
    stored = quantized(w, scheme, axis=-1 if name == "left" else -2)
    plain = stored.dequantize()
    apply: Any = jlora.lora(lambda tree, x: fn(tree["w"], x), materialize="allow")
    got, want = apply({"w": stored}, x), fn(plain, x)
    if name == "returned":
        assert isinstance(got[1], QuantizedArray) and got[1].scheme == stored.scheme
        got, want = got[0], want[0]
    assert_equal(got, want)
    assert_equal(
        jax.grad(lambda x: jnp.sum(jnp.sin(jax.tree.leaves(apply({"w": stored}, x))[0])))(x),
        jax.grad(lambda x: jnp.sum(jnp.sin(jax.tree.leaves(fn(plain, x))[0])))(x),
        1e-5,
    )
    uses = jlora.trace(lambda tree, x: fn(tree["w"], x), {"w": stored}, x)
    assert uses == jlora.trace(lambda tree, x: fn(tree["w"], x), {"w": plain}, x)
    if name == "elementwise":
        return
    for dora in (False, True):
        config = LoraConfig(rank=2, targets=("w",), use_dora=dora)
        adapters = moved(jlora.init(jax.random.key(2), {"w": stored}, config, uses))

        def loss(adapters: Any, w: Any) -> Any:
            out = apply(jlora.attach({"w": w}, adapters), x)
            return jnp.sum(jnp.sin(out[0] if isinstance(out, tuple) else out))

        both = [jax.value_and_grad(loss)(adapters, w) for w in (stored, plain)]
        assert_equal(both[0], both[1], 1e-5)


TABLES = {
    "by rows": lambda w, i: jnp.take(w, i, axis=0),
    "clipped": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "in bounds": lambda w, i: w.at[jnp.clip(i, 0, 15)].get(mode="promise_in_bounds"),
    "tied": lambda w, i: jnp.take(w, i, axis=0) @ w.T,
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_quantized_table_are_looked_up(name, axis):
    """Indices out of bounds give what they give in the dequantized table: NaN, or the last row."""
    stored = quantized(jax.random.normal(jax.random.key(0), (16, 8)), "nf4", axis)
    index = jnp.array([[0, 3, 15], [7, -1, 99]])
    fn = TABLES[name]
    got, want = jlora.lora(lambda t, i: fn(t["w"], i))({"w": stored}, index), fn(stored.dequantize(), index)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert_equal(jnp.nan_to_num(got), jnp.nan_to_num(want))
    apply: Any = jlora.lora(lambda t, i: fn(t["w"], i), materialize="allow")
    uses = jlora.trace(lambda t, i: fn(t["w"], i), {"w": stored}, index)
    adapters = moved(jlora.init(jax.random.key(2), {"w": stored}, LoraConfig(rank=2, targets=("w",)), uses))
    pair = [apply(jlora.attach({"w": w}, adapters), index) for w in (stored, stored.dequantize())]
    assert_equal(jnp.nan_to_num(pair[0]), jnp.nan_to_num(pair[1]))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        y = nn.LayerNorm()(x)  # 22 = 2 heads x 11
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        return x + nn.Dense(22)(nn.gelu(nn.Dense(40)(x))), None


class Model(nn.Module):
    """Scanned and rematerialized layers, a table that is tied to the head, and a convolution."""

    scanned: bool = True

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(24, 22, name="table")
        x = table(tokens)
        if self.scanned:
            layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = Block(name=f"layer_{i}")(x, None)
        return table.attend(nn.Conv(22, (3,), name="conv")(x))


TOKENS = jnp.arange(12).reshape(2, 6)


def model_and_params(scanned: bool = True, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    model = Model(scanned)
    return model, jax.tree.map(lambda x: x.astype(dtype), model.init(jax.random.key(0), TOKENS))


def quantized_tree(params: Any, scheme: str) -> Any:
    leaves, treedef = jlora.named_leaves(params)
    is_weight = [x.ndim > 1 and not path.endswith(("bias", "scale")) for path, x in leaves.items()]
    return treedef.unflatten(
        [quantized(x, scheme) if one else x for x, one in zip(leaves.values(), is_weight, strict=True)]
    )


def sizes(tree: Any) -> set[tuple[int, ...]]:
    """The shapes of the weights, and of their layers."""
    shapes = [x.shape for x in jlora.named_leaves(tree)[0].values() if isinstance(x, QuantizedArray)]
    return {*shapes, *(shape[1:] for shape in shapes if len(shape) > 2)}


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_no_dequantized_weight_is_kept_for_the_backward_pass(scanned):
    """What a derivative keeps has no floating array of a weight's shape; with plain weights it has many."""
    model, params = model_and_params(scanned)
    tree = quantized_tree(params, "nf4")
    apply: Any = jlora.lora(model.apply, materialize="error")
    config = LoraConfig(rank=2, exclude=("table",))
    adapters = jlora.init(jax.random.key(1), tree, config, jlora.trace(model.apply, tree, TOKENS))

    def kept(tree: Any) -> list[Any]:
        def derivative(adapters: Any) -> Any:
            return jax.vjp(lambda a: apply(jlora.attach(tree, a), TOKENS), adapters)[1]

        found = jax.tree.leaves(jax.eval_shape(derivative, adapters))
        return [x.shape for x in found if x.dtype == jnp.float32 and x.shape in weights]

    weights = sizes(tree)
    assert not kept(tree)
    assert len(kept(dequantized(tree))) >= 7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_on_a_quantized_base_is_training_on_the_dequantized_one(scheme):
    """Three steps of AdamW over the whole attached tree, compiled once; the base does not change."""
    model, params = model_and_params()
    tree = quantized_tree(params, scheme)
    apply: Any = jlora.lora(model.apply, materialize="error")
    uses = jlora.trace(model.apply, tree, TOKENS)
    config = LoraConfig(rank=2, exclude=(), targets=(r"kernel$", "table"), train_also=("LayerNorm",), dropout=0.1)
    adapters = jlora.init(jax.random.key(1), tree, config, uses)
    tx: Any = optax.adamw(1e-2)
    count = 0

    @jax.jit
    def step(adapters: Any, state: Any, base: Any, key: Any) -> Any:
        nonlocal count
        count += 1

        def loss(adapters: Any) -> Any:
            logits = apply(jlora.attach(base, adapters, dropout_key=key), TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    def train(base: Any) -> Any:
        now, state, values = adapters, tx.init(adapters), []
        for i in range(3):
            now, state, value = step(now, state, base, jax.random.key(i))
            values.append(value)
        return now, values

    assert_equal(train(tree), train(dequantized(tree)), 1e-4)
    assert count == 2


def test_vmap_jvp_and_second_derivatives_of_a_quantized_weight():
    w = quantized(jax.random.normal(jax.random.key(0), (16, 12)), "nf4")
    x = jax.random.normal(jax.random.key(1), (3, 16))
    apply: Any = jlora.lora(lambda t, x: jnp.sin(x @ t["w"]))
    many = [moved(jlora.init(jax.random.key(i), {"w": w}, LoraConfig(rank=2, targets=("w",)))) for i in range(3)]
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *many)

    def loss(adapters: Any, w: Any, x: Any) -> Any:
        return apply(jlora.attach({"w": w}, adapters), x).sum()

    for fn in (
        jax.vmap(jax.grad(loss), (0, None, None)),
        lambda a, w, x: jax.jvp(lambda x: loss(many[0], w, x), (x,), (x,)),
        lambda a, w, x: jax.hessian(lambda x: loss(many[0], w, x))(x[:1]),
    ):
        assert_equal(fn(stack, w, x), fn(stack, w.dequantize(), x), 1e-5)


@pytest.mark.parametrize(("spec", "axis"), [(P("d"), -2), (P(None, "d"), -2), (P("d"), -1), (P(None, "d"), -1)])
def test_a_quantized_weight_is_split_over_a_mesh_with_its_scales(spec, axis):
    """Auto meshes and `shard_map`; where a block would be split, its scales stay whole."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    w = quantized(jax.random.normal(jax.random.key(0), (64, 32)), "double", axis)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    places = jlora.shardings({"w": w}, mesh, [("w", spec)])
    placed = jax.device_put({"w": w}, places)
    apply: Any = jlora.lora(lambda t, x: jnp.sin(x @ t["w"]))
    uses = jlora.trace(lambda t, x: x @ t["w"], placed, x)
    adapters = moved(jlora.init(jax.random.key(1), placed, LoraConfig(rank=2, targets=("w",)), uses))
    tree = jlora.attach(placed, adapters)
    own = jlora.adapter_shardings(tree, places)
    assert jax.tree.structure(own) == jax.tree.structure(tree)
    want = apply(jlora.attach({"w": w.dequantize()}, adapters), x)
    assert_equal(jax.jit(apply, in_shardings=(own, None))(jax.device_put(tree, own), x), want, 1e-5)

    summed = spec[0] == "d"
    inputs = P(None, "d") if summed else P()

    def shard(t: Any, x: Any) -> Any:
        y = x @ t["w"]
        return jnp.sin(jax.lax.psum(y, "d") if summed else y)

    whole = jax.shard_map(shard, mesh=mesh, in_specs=({"w": spec}, inputs), out_specs=P(*((None,) if summed else spec)))
    for given in ({"w": w}, tree):
        expected = apply({"w": w.dequantize()}, x) if given is not tree else want
        assert_equal(jax.jit(jlora.lora(whole))(given, x), expected, 1e-5)


def test_an_error_says_how_to_merge_into_a_quantized_base():
    w = quantized(jax.random.normal(jax.random.key(0), (16, 12)), "nf4")
    adapters = moved(jlora.init(jax.random.key(0), {"w": w}, LoraConfig(rank=2, targets=("w",))))
    for call in (jlora.merge, jlora.unmerge, jlora.rounding):
        with pytest.raises(TypeError, match=r"(?s)'w': nf4.*jlora.dequantize\(params\)"):
            call({"w": w}, adapters)
    merged = jlora.merge({"w": w.dequantize()}, adapters)
    x = jax.random.normal(jax.random.key(1), (3, 16))
    assert_equal(x @ merged["w"], jlora.lora(lambda t, x: x @ t["w"])(jlora.attach({"w": w}, adapters), x), 1e-5)


def test_a_quantized_leaf_can_be_trained_whole():
    """As a floating copy, as PEFT's modules_to_save; merging returns it."""
    w = quantized(jax.random.normal(jax.random.key(0), (16, 12)), "nf4")
    adapters = jlora.init(jax.random.key(0), {"w": w}, LoraConfig(targets=(), train_also=("w",)))
    assert_equal(adapters["w"], w.dequantize())
    x = jnp.ones((2, 16))
    assert_equal(jlora.lora(lambda t, x: x @ t["w"])(jlora.attach({"w": w}, adapters), x), x @ w.dequantize())
    assert_equal(jlora.merge({"w": w}, adapters)["w"], w.dequantize())


def test_the_plan_shows_the_scheme_of_each_weight():
    model, params = model_and_params()
    tree = quantized_tree(params, "nf4")
    uses = jlora.trace(model.apply, tree, TOKENS)
    plan = jlora.plan(tree, LoraConfig(rank=2), uses)
    assert "3x22x40 nf4" in str(plan) and all(target.scheme == "nf4" for target in plan.values())
    plain = jlora.plan(params, LoraConfig(rank=2), jlora.trace(model.apply, params, TOKENS))
    assert list(plan) == list(plain) and plan.total == plain.total and plan.trainable == plain.trainable
    explained = jlora.explain(model.apply, jlora.attach(tree, jlora.init(jax.random.key(0), tree, plan)), TOKENS)
    assert "nf4" in str(explained) and not explained.materialized


def test_quantized_leaves_are_partitioned_labelled_and_frozen():
    """They are frozen parts of an attached tree; `freeze` changes no bit of them."""
    model, params = model_and_params()
    tree = quantized_tree(params, "double")
    adapters = jlora.init(jax.random.key(0), tree, LoraConfig(rank=2), jlora.trace(model.apply, tree, TOKENS))
    attached = jlora.attach(tree, adapters)
    trainable, frozen = jlora.partition(attached)
    assert_equal(jlora.combine(trainable, frozen), attached)
    back, own = jlora.detach(attached)
    assert jax.tree.structure(back) == jax.tree.structure(tree) and set(own) == set(adapters)
    labels = jlora.labels(attached)
    assert jax.tree.structure(labels) == jax.tree.structure(attached)
    tx = jlora.freeze(optax.sgd(1e-1))
    grads = jax.tree.map(lambda x: None if jnp.issubdtype(x.dtype, jnp.integer) else jnp.ones_like(x), attached)
    updates, _ = tx.update(grads, tx.init(attached), attached)
    new = optax.apply_updates(attached, updates)
    for x, y in zip(jax.tree.leaves(jlora.detach(new)[0]), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_bytes_are_those_of_the_codes_and_scales():
    w = quantized(jnp.ones((64, 32)), "nf4")
    assert w.nbytes == 64 * 32 // 2 + 8 * 32 * 4
    analysis: Any = jax.jit(lambda t: t.dequantize().sum()).lower(w).compile().memory_analysis()
    assert analysis.argument_size_in_bytes == w.nbytes


def test_export_and_flax_serialization_keep_quantized_leaves():
    from flax import serialization
    from jax import export

    w = quantized(jax.random.normal(jax.random.key(0), (16, 12)), "double")
    x = jnp.ones((2, 16))
    exported = export.export(jax.jit(jlora.lora(lambda t, x: x @ t["w"])))({"w": w}, x)
    again = export.deserialize(exported.serialize())
    assert_equal(again.call({"w": w}, x), x @ w.dequantize())
    restored = serialization.from_state_dict({"w": w}, serialization.to_state_dict({"w": w}))
    assert_equal(restored, {"w": w})


def test_factors_of_every_axes_meet_a_quantized_base():
    """Also against the grain: blocks along outputs, or along a stack's inputs."""
    shape = (2, 8, 16)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    for axis, scheme in itertools.product((1, 2), SCHEMES):
        w = quantized(jax.random.normal(jax.random.key(0), shape), scheme, axis)
        f = LoraFactors(jnp.ones((2, 8, 3)) / 3, jnp.ones((2, 3, 16)) / 5, axes=Axes((0,), (1,), (2,)))
        apply: Any = jlora.lora(lambda t, x: jnp.einsum("ebi,eio->ebo", x, t["w"]), materialize="error")
        pair = [apply(jlora.attach({"w": base}, {"w": f}), x) for base in (w, w.dequantize())]
        assert_equal(pair[0], pair[1], 1e-5)


def test_a_bfloat16_base_is_rounded_once():
    """Codes times scales in float32, then bfloat16: as the dequantized leaf, also where the model casts it up."""
    w = quantized(jax.random.normal(jax.random.key(0), (16, 12)).astype(jnp.bfloat16), "nf4")
    assert w.dtype == jnp.bfloat16
    x = jax.random.normal(jax.random.key(1), (3, 16))
    fn = lambda t, x: x @ t["w"].astype(jnp.float32)  # noqa: E731
    assert_equal(jlora.lora(fn)({"w": w}, x), fn({"w": w.dequantize()}, x))


def test_places_of_a_quantized_leaf():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    w = quantized(jnp.ones((64, 32)), "nf4", block=32)
    assert w.scales.shape == (2, 32)
    place = jlora.shardings({"w": w}, mesh, [("w", P("d", None))])["w"]
    assert place.codes == NamedSharding(mesh, P("d", None)) and not any(place.scales.spec)
