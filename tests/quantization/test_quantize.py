"""`quantize`, `dequantize` and `quantize_array`: which weights, in which blocks, and with which errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora._src.quantized import DYNAMIC, NF4
from tests.messages import expect, message

SCHEMES = ["nf4", "nf4-32", "int8", "int8-64", "int4", "int4-64", "fp8", "mxfp4"]
STEPS = {"nf4": 0.15, "int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 1 / 28, "mxfp4": 0.25}
"""The largest error of an entry, relative to the largest of its block."""


class Model(nn.Module):
    """A table, a norm, a stack of two scanned layers, a convolution and a head."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm")(nn.Embed(40, 64, name="embed")(ids))
        x = nn.Conv(32, (3,), name="conv")(x)
        layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layer(name="layers")(x, None)
        return nn.Dense(3, name="head")(nn.Dense(64, name="out")(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.Dense(x.shape[-1], name="dense", bias_init=nn.initializers.normal())(x), None


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, Any]:
    ids = jnp.arange(12).reshape(2, 6)
    params = Model().init(jax.random.key(0), ids)
    return params, ids, jlora.trace(Model().apply, params, ids)


def quantized_paths(tree: Any) -> set[str]:
    return {path for path, leaf in jlora.named_leaves(tree)[0].items() if isinstance(leaf, jlora.QuantizedArray)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_entry_is_further_off_than_half_a_step_of_its_block(scheme: str, dtype: str) -> None:
    """Also where values span many orders of magnitude, and where whole blocks are zero."""
    drawn = jax.random.normal(jax.random.key(0), (3, 128, 96)) * 10.0 ** jnp.arange(-2, 1).reshape(3, 1, 1)
    weight = drawn.at[0, :64, 0].set(0).at[1, :, 1].set(0).astype(dtype)
    array = jlora.quantize_array(weight, scheme)
    assert array.shape == weight.shape and array.dtype == weight.dtype
    found = array.astype(jnp.float32).dequantize()
    blocks = weight.astype(jnp.float32).reshape(3, array.scales.shape[1], -1, 96)
    largest = jnp.broadcast_to(jnp.abs(blocks).max(2, keepdims=True), blocks.shape).reshape(weight.shape)
    scale_error = 0.03 * jnp.abs(largest).max((1, 2), keepdims=True) if array.groups is not None else 0
    step = STEPS[array.scheme] * 1.001 + (2**-8 if array.groups is not None else 0)
    assert jnp.all(jnp.abs(found - weight.astype(jnp.float32)) <= step * largest + scale_error)
    assert jnp.all(found[0, :64, 0] == 0) and jnp.all(found[1, :, 1] == 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_again_changes_nothing(scheme: str) -> None:
    """A weight that has the values of a scheme keeps them. (Coded scales depend on each other: close, not equal.)"""
    weight = jax.random.normal(jax.random.key(1), (2, 128, 64))
    once = jlora.quantize_array(weight, scheme).dequantize()
    twice = jlora.quantize_array(once, scheme).dequantize()
    tolerance = 0.02 if scheme.startswith("nf4") else 1e-6
    np.testing.assert_allclose(twice, once, atol=tolerance * float(jnp.abs(weight).max()))


class Blocks(NamedTuple):
    shape: tuple[int, ...]
    axes: jlora.Axes | None
    scales: tuple[int, ...]
    groups: tuple[int, ...]


LAYOUTS = {
    "a matrix": Blocks((4096, 96), None, (64, 96), (1, 24)),
    "a stack": Blocks((3, 128, 96), None, (3, 2, 96), (3, 1, 1)),
    "smaller blocks": Blocks((150, 8), None, (3, 8), (1, 1)),
    "larger blocks": Blocks((134, 8), None, (2, 8), (1, 1)),
    "a prime": Blocks((67, 8), None, (1, 8), (1, 1)),
    "less than a block": Blocks((40, 8), None, (1, 8), (1, 1)),
    "heads": Blocks((4, 8, 32), jlora.Axes((), (0, 1), (2,)), (1, 1, 32), (1, 1, 1)),
    "many heads": Blocks((12, 32, 64), jlora.Axes((), (0, 1), (2,)), (6, 1, 64), (1, 1, 2)),
    "outputs first": Blocks((96, 128), jlora.Axes((), (1,), (0,)), (96, 2), (1, 1)),
    "a convolution": Blocks((3, 3, 128, 16), jlora.Axes((), (0, 1, 2), (3,)), (3, 3, 2, 16), (1, 1, 1, 2)),
    "many outputs": Blocks((64, 1000), None, (1, 1000), (1, 4)),
    "no entries": Blocks((2, 0, 8), None, (2, 0, 8), (2, 0, 1)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_blocks_follow_the_inputs_and_groups_the_blocks(layout: Blocks) -> None:
    """Batch and output axes have scales of their own; and each batch entry a group and an offset of its own."""
    array = jlora.quantize_array(jnp.ones(layout.shape), "nf4", layout.axes)
    assert array.groups is not None and array.offset is not None
    assert (array.scales.shape, array.groups.shape) == (layout.scales, layout.groups)
    batch = (layout.axes or jlora.Axes(tuple(range(len(layout.shape) - 2)))).batch
    assert array.offset.shape == tuple(n if i in batch else 1 for i, n in enumerate(layout.shape))
    assert jnp.all(array.dequantize() == 1)


def test_a_stack_is_quantized_as_its_matrices() -> None:
    """So a scan may slice it, and a model may quantize its layers one by one."""
    weight = jax.random.normal(jax.random.key(2), (3, 128, 96)) * jnp.arange(1, 4).reshape(3, 1, 1)
    for scheme in SCHEMES:
        whole = jlora.quantize_array(weight, scheme)
        for i in range(3):
            one = jlora.quantize_array(weight[i], scheme)
            part = jax.tree.map(lambda x, i=i: x[i], whole)
            np.testing.assert_array_equal(part.codes, one.codes)
            np.testing.assert_allclose(part.dequantize(), one.dequantize(), rtol=1e-6)


def test_with_uses_the_weights_of_products_are_quantized(case: tuple[Any, Any, Any]) -> None:
    params, _, uses = case
    tree = jlora.quantize(params, "nf4", uses)
    assert quantized_paths(tree) == {f"params/{name}/kernel" for name in ("conv", "layers/dense", "out")}
    assert tree["params"]["embed"]["embedding"] is params["params"]["embed"]["embedding"]
    everything = jlora.quantize(params, "int8", uses, targets=("kernel$", "embed"), exclude=())
    assert quantized_paths(everything) >= {"params/embed/embedding", "params/head/kernel"}
    table = everything["params"]["embed"]["embedding"]
    assert table.scales.shape == (40, 1), "a row that is looked up has a scale of its own"


def test_without_uses_names_decide(case: tuple[Any, Any, Any]) -> None:
    params, _, _ = case
    tree = jlora.quantize(params, "nf4")
    assert quantized_paths(tree) == {f"params/{name}/kernel" for name in ("conv", "layers/dense", "out")}
    assert jlora.quantize(params, "int8", targets=("embed",))["params"]["embed"]["embedding"].scales.shape == (40, 1)


def test_dequantize_gives_plain_arrays(case: tuple[Any, Any, Any]) -> None:
    params, ids, uses = case
    plain = jlora.dequantize(jlora.quantize(params, "int8", uses))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    expected = np.asarray(Model().apply(params, ids))
    np.testing.assert_allclose(np.asarray(Model().apply(plain, ids)), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_jit_and_as_shapes_the_result_is_the_same(scheme: str, case: tuple[Any, Any, Any]) -> None:
    params, _, uses = case
    tree = jlora.quantize(params, scheme, uses)
    traced = jax.jit(lambda p: jlora.quantize(p, scheme, uses))(params)
    for one, other in zip(
        jax.tree.leaves(jlora.dequantize(tree)), jax.tree.leaves(jlora.dequantize(traced)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for made in (
        jax.eval_shape(lambda p: jlora.quantize(p, scheme, uses), params),
        jlora.quantize(jax.eval_shape(lambda: params), scheme, uses),
    ):
        assert jax.tree.structure(made) == jax.tree.structure(shapes)
        assert [x.shape for x in jax.tree.leaves(made)] == [x.shape for x in jax.tree.leaves(shapes)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_weight_stays_sharded(kind: AxisType) -> None:
    """Its scales are split like its blocks, where the mesh divides them; the values are those of one device."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    weight = jax.random.normal(jax.random.key(0), (1024, 512))
    split = jax.device_put(weight, NamedSharding(mesh, P("fsdp", "tensor")))
    for scheme in SCHEMES:
        one, many = (jlora.quantize({"w": w}, scheme)["w"] for w in (weight, split))
        assert many.codes.sharding.spec == P("fsdp", "tensor")
        assert many.scales.sharding.spec == P("fsdp" if many.scales.shape[0] > 1 else None, "tensor")
        back = jlora.dequantize({"w": many})["w"]
        assert back.sharding.spec == P("fsdp", "tensor")
        np.testing.assert_allclose(back, one.dequantize(), rtol=1e-6, atol=1e-6)


def test_the_loss_is_that_of_each_weight(case: tuple[Any, Any, Any]) -> None:
    params, _, uses = case
    tree = jlora.quantize(params, "nf4", uses)
    loss = jlora.quantization_loss(params, tree)
    before, after = jlora.named_leaves(params)[0], jlora.named_leaves(jlora.dequantize(tree))[0]
    for path, lost in loss.items():
        error = np.linalg.norm(after[path] - before[path]) / np.linalg.norm(before[path])
        np.testing.assert_allclose(lost, error, rtol=1e-4)
        assert 0.05 < lost < 0.15
    expect(str(loss), "params/out/kernel", "nf4", "4.", "%", "most is lost in")
    assert str(jlora.quantization_loss(params, params)).endswith("nothing is quantized")
    zero = jlora.quantization_loss({"w": jnp.zeros((8, 8))}, jlora.quantize({"w": jnp.zeros((8, 8))}, "int8"))
    assert zero["w"] == 0
    other = {"w": tree["params"]["out"]["kernel"]}
    expect(message(ValueError, lambda: jlora.quantization_loss({"v": jnp.zeros((4, 4))}, other)), "'w'", "missing")


def refused(params: Any, uses: Any = None, **options: Any) -> str:
    return message(ValueError, lambda: jlora.quantize(params, "int8", uses, **options))


def test_wrong_weights_are_listed_by_path(case: tuple[Any, Any, Any]) -> None:
    params, _, uses = case
    weight = jnp.ones((4, 4))
    broken = {"u": weight, "v": weight.at[0, 0].set(jnp.nan), "w": weight * jnp.inf}
    expect(refused(broken), "2 of 3", "'v'", "'w'", "NaN")
    wrong = {"ids": jnp.ones((4, 4), int), "row": jnp.ones(4)}
    expect(refused(wrong, targets=("ids", "row")), "'ids'", "int32", "'row'", "(4,)", "not a floating matrix")
    twice = jlora.quantize(params, "nf4", uses)
    expect(refused(twice, targets=("out",)), "params/out/kernel", "nf4", "dequantize")
    config = jlora.LoraConfig(targets=("out/kernel",))
    attached = jlora.attach(params, jlora.init(jax.random.key(0), params, config))
    expect(refused(attached, targets=("out/k",)), "params/out/kernel", "adapter")
    expect(refused({"bias": jnp.ones(3)}), "nothing is left", "1 leaves")
    expect(refused({"other": weight}, uses), "another tree", "other")


def test_wrong_patterns_are_listed(case: tuple[Any, Any, Any]) -> None:
    params, _, uses = case
    text = refused(params, uses, targets=("outs",), exclude=("embedd1ng",))
    expect(text, "target 'outs'", "params/out/kernel", "exclude 'embedd1ng'", "params/embed/embedding")
    expect(refused(params, uses, targets=("(",)), "'('", "regular expression")
    expect(refused(params, uses, targets="out"), "'out'", "tuple")


@pytest.mark.parametrize("name", ["nf5", "int8-", "int8-0", "int8--4", "fp16", "", None, 8])
def test_an_unknown_scheme_is_refused(name: Any) -> None:
    expect(message(ValueError, lambda: jlora.Scheme.parse(name)), repr(name), "nf4", "mxfp4")


def test_schemes_have_names() -> None:
    for name in SCHEMES:
        assert str(jlora.Scheme.parse(name)) == name and jlora.Scheme.parse(jlora.Scheme.parse(name)).block != 0
    assert jlora.Scheme.parse("nf4-64") == jlora.Scheme("nf4") == jlora.Scheme("nf4", 64, double=True)
    assert "float32 scales" in str(jlora.Scheme("nf4", double=False))
    fields: Any = {"format": "int3", "block": 0, "double": True}
    expect(message(ValueError, lambda: jlora.Scheme(**fields)), "int3", "block = 0", "double")


def test_the_tables_are_sorted() -> None:
    for table, count in ((NF4, 16), (DYNAMIC, 256)):
        assert len(table) == count and list(table) == sorted(table) and 0 in table and max(table) == 1


class QArray(NamedTuple):
    """Like qwix's: the fields, and the name of the class."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = None


def test_arrays_of_qwix_become_ours_without_a_copy_of_their_codes() -> None:
    ours = jlora.quantize_array(jax.random.normal(jax.random.key(0), (128, 8)), "int8-64")
    theirs = QArray(ours.codes, ours.scales.astype(jnp.bfloat16), qtype=jnp.int8)
    tree = jlora.from_qwix({"kernel": theirs, "bias": jnp.ones(3)})
    kernel = tree["kernel"]
    assert kernel.codes is theirs.qvalue and kernel.scheme == "int8" and kernel.dtype == jnp.bfloat16
    product = theirs.qvalue.astype(jnp.bfloat16).reshape(2, 64, 8) * theirs.scale.reshape(2, 1, 8)
    np.testing.assert_array_equal(kernel.dequantize(), product.reshape(128, 8))
    shifted = {"kernel": theirs._replace(zero_point=jnp.zeros((2, 8), jnp.int8))}
    expect(message(ValueError, lambda: jlora.from_qwix(shifted)), "'kernel'", "zero points", "absmax")


@pytest.mark.parametrize("qtype", ["nf4", "int8", "int4", "float8_e4m3fn", "mxfp4", "int3"])
def test_live_arrays_of_qwix_have_the_same_values(qtype: str) -> None:
    qwix = pytest.importorskip("qwix", reason="compares with qwix")
    weight = jax.random.normal(jax.random.key(0), (128, 8))
    theirs = qwix.quantize(weight, qtype, tiled_axes={0: 32}, channelwise_axes=(1,))
    ours = jlora.from_qwix({"w": theirs})["w"]
    np.testing.assert_allclose(ours.dequantize(), qwix.dequantize(theirs), rtol=1e-6)
