"""How parameters and adapters are sharded over a mesh: the rules of every family, their errors, unchanged results."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import models, named_leaves
from jlora.models._registry import FAMILIES
from tests.golden import make_decoders, make_encoders
from tests.messages import expect, message
from tests.toys import assert_close

TINY = {
    name: json.loads((module.HERE / name / "config.json").read_text())
    for module in (make_decoders, make_encoders)
    for name in module.CONFIGS
}
PUBLISHED = {
    **{n: x["config"] for n, x in json.loads((make_decoders.HERE.parent / "published.json").read_text()).items()},
    **{kind: {"model_type": kind} for kind in ("bert", "roberta", "vit")},  # whose defaults are the base models
}
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
ROWS = P(("data", "fsdp"))


@functools.cache
def mesh(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def array(*shape: int) -> Any:
    """Only its shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def held(places: Any, shapes: Any) -> float:
    """The share of all entries that one device holds."""
    pairs = list(zip(jax.tree.leaves(places), jax.tree.leaves(shapes), strict=True))
    return sum(math.prod(p.shard_shape(x.shape)) for p, x in pairs) / sum(math.prod(x.shape) for _, x in pairs)


# ---- rules of the families


@pytest.mark.parametrize("name", TINY)
def test_rules_take_every_leaf_and_each_takes_one(name: str) -> None:
    """For every task and option of a family, on every mesh; nothing is split over the axis of the data."""
    for task in FAMILIES[TINY[name]["model_type"]].networks:
        model = models.build(TINY[name], task=task)
        shapes = models.abstract(model)
        for shape in MESHES:
            places = jlora.shardings(shapes, mesh(*shape), models.sharding_rules(model))
            assert jax.tree.structure(places) == jax.tree.structure(shapes)
            assert not any("data" in str(place.spec) for place in jax.tree.leaves(places))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_rule_of_a_family_is_some_networks(kind: str) -> None:
    """A family has no rule that none of its networks needs."""
    shared = [hf for hf in TINY.values() if FAMILIES[hf["model_type"]].sharding_rules == FAMILIES[kind].sharding_rules]
    used = {
        rule
        for hf in [*shared, *({**hf, "tie_word_embeddings": False} for hf in shared if hf["model_type"] == "gpt2")]
        for task in FAMILIES[hf["model_type"]].networks
        for rule in models.sharding_rules(models.build(hf, task=task))
    }
    assert used == set(FAMILIES[kind].sharding_rules)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_split_evenly(name: str) -> None:
    """Over eight devices each holds an eighth, but for norms, biases and, split over two axes, small vocabularies."""
    model = models.build(PUBLISHED[name])
    shapes = models.abstract(model)
    places = {shape: jlora.shardings(shapes, mesh(*shape), models.sharding_rules(model)) for shape in MESHES}
    assert held(places[8, 1, 1], shapes) == 1
    assert 1 / 8 <= held(places[1, 8, 1], shapes) < 1.03 / 8
    small = PUBLISHED[name]["model_type"] in ("bert", "roberta", "gpt2")
    assert 1 / 4 <= held(places[2, 2, 2], shapes) < (1.4 if small else 1.03) / 4


def test_the_first_of_a_pair_is_split_by_its_outputs_and_the_second_by_its_inputs() -> None:
    """So that each pair needs only one sum over the mesh axis ``tensor``."""
    model = models.build(TINY["llama-linear"])
    places, _ = named_leaves(jlora.shardings(models.abstract(model), mesh(2, 2, 2), models.sharding_rules(model)))
    layers = "params/model/layers"
    assert places[f"{layers}/self_attn/q_proj/kernel"].spec == P(None, "fsdp", "tensor")
    assert places[f"{layers}/self_attn/q_proj/bias"].spec == P(None, "tensor")
    assert places[f"{layers}/self_attn/o_proj/kernel"].spec == P(None, "tensor", "fsdp")
    assert places[f"{layers}/self_attn/o_proj/bias"].spec == P()


# ---- adapters


@st.composite
def splits(draw: Any) -> tuple[jlora.Axes, tuple[int, ...], P]:
    """The roles of a weight's axes, its shape, and a split of it over a mesh of 2 x 2 x 2."""
    order = draw(st.permutations(range(draw(st.integers(2, 5)))))
    inputs = draw(st.integers(0, len(order) - 2))
    outputs = draw(st.integers(inputs + 1, len(order) - 1))
    groups = (order[:inputs], order[inputs:outputs], order[outputs:])
    owners = draw(st.tuples(*(st.integers(-1, len(order) - 1) for _ in range(3))))
    names = ("data", "fsdp", "tensor")
    entries = [tuple(n for n, owner in zip(names, owners, strict=True) if owner == i) for i in range(len(order))]
    shape = tuple(8 * (i + 1) for i in range(len(order)))
    return jlora.Axes(*(tuple(sorted(g)) for g in groups)), shape, P(*(e or None for e in entries))


@given(splits())
def test_every_device_has_the_factors_of_its_part(split: tuple[jlora.Axes, tuple[int, ...], P]) -> None:
    """Whatever the layout (heads, stacked, experts, convolution, lookup): the slices of A, B and DoRA's magnitude are
    those of the weight along the axes that they follow, and all of the rank."""
    axes, shape, spec = split
    batch, inputs, outputs = axes.sizes(shape)
    factors: Any = jlora.LoraFactors(
        array(*batch, *inputs, 3), array(*batch, 3, *outputs), array(*batch, *outputs), axes=axes, scale=2.0
    )
    weight = NamedSharding(mesh(2, 2, 2), spec)
    found = jlora.adapter_shardings({"w": factors}, {"w": weight, "other": weight})
    assert jax.tree.structure(found) == jax.tree.structure({"w": factors})
    where = {
        name: getattr(found["w"], name).devices_indices_map(getattr(factors, name).shape)
        for name in ("a", "b", "magnitude")
    }
    for device, index in weight.devices_indices_map(shape).items():
        own, rows, columns = axes.sizes(index)  # pyright: ignore[reportArgumentType]
        assert where["a"][device] == (*own, *rows, slice(None))
        assert where["b"][device] == (*own, slice(None), *columns)
        assert where["magnitude"][device] == (*own, *columns)


def test_one_sharding_for_all_and_leaves_that_are_trained_whole() -> None:
    """A single NamedSharding is every weight's; a whole leaf has its weight's own."""
    adapters: Any = {"w": jlora.LoraFactors(array(8, 3), array(3, 16)), "bias": array(16)}
    split = NamedSharding(mesh(1, 8, 1), P("fsdp"))
    found = jlora.adapter_shardings(adapters, split)
    assert (found["w"].a.spec, found["w"].b.spec, found["bias"]) == (P("fsdp", None), P(None, None), split)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("options", [{}, {"strength": 0.5, "dropout_key": jax.random.key(1)}])
def test_an_attached_tree_is_sharded_like_its_weights_and_adapters(boxed: bool, options: Any) -> None:
    """Each leaf of an attached tree is sharded as in the plain params' shardings and adapter_shardings; strengths and
    keys are replicated; flax's boxes are kept. A jit that pins these shardings computes the same."""
    grid = mesh(1, 4, 2)
    init = nn.initializers.lecun_normal()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Dense(8, name="up", kernel_init=nn.with_partitioning(init, ("fsdp", "tensor")))(x)
            return nn.Dense(4, name="down", kernel_init=nn.with_partitioning(init, ("tensor", None)))(jnp.tanh(h))

    model, x = Model(), jnp.ones((2, 12))
    params: Any = model.init(jax.random.key(0), x)
    places = nn.get_sharding(params, grid)
    params = params if boxed else nn.meta.unbox(params)
    config = jlora.LoraConfig(rank=3, dropout=0.1, train_also=("down/bias",), use_dora=True, exclude=())
    adapters = jlora.init(jax.random.key(0), params, config, jlora.trace(model.apply, params, x))
    tree = jlora.attach(params, adapters, **options)
    found = jlora.adapter_shardings(tree, places)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    alone, own = jlora.detach(found)
    assert own == jlora.adapter_shardings(adapters, places)
    assert named_leaves(alone)[0] == named_leaves(places)[0]
    rest = [
        place for keys, place in jax.tree.leaves_with_path(found) if "strength" in str(keys) or "key" in str(keys[-1])
    ]
    assert all(place == NamedSharding(grid, P()) for place in rest) and len(rest) == 2 * len(options)
    put = jax.device_put(tree, found)
    apply = jlora.lora(model.apply)
    assert_close(jax.jit(apply, in_shardings=(found, None))(put, x), apply(tree, x))
    with pytest.raises(TypeError, match="jlora.adapter_shardings"):
        jlora.attach(places, own)


# ---- what is split computes what is whole


def assert_same_training(name: str, folder: Path, shape: tuple[int, int, int], **options: Any) -> str:
    """Fresh adapters, loss and gradients of a checkpoint equal those on one device. Returns the compiled step."""
    model: Any = models.build(TINY[name])
    leaves, treedef = jax.tree.flatten(models.abstract(model))
    rng = np.random.default_rng(0)
    models.save(folder, model, treedef.unflatten([rng.normal(0, 0.3, x.shape).astype("float32") for x in leaves]))
    places = jlora.shardings(models.abstract(model), mesh(*shape), models.sharding_rules(model))
    whole, split = models.load(folder)[1], models.load(folder, shardings=places)[1]
    total = sum(x.nbytes for x in jax.tree.leaves(split))
    parts = [sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(split)) for i in range(8)]
    assert max(parts) == min(parts) == round(total * held(places, split))

    ids = jnp.asarray(rng.integers(6, 40, (16, 5)))
    config = jlora.LoraConfig(rank=3, alpha=6, **options)
    uses = jlora.trace(model.apply, whole, ids)
    start = jax.jit(lambda params: jlora.init(jax.random.key(0), params, config, uses))
    expected = start(whole)
    at = jlora.adapter_shardings(jax.eval_shape(start, whole), places)
    adapters = jax.block_until_ready(jax.jit(start, out_shardings=at)(split))
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, adapters, at))

    apply = jlora.lora(model.apply, materialize="error")

    def loss(adapters: Any, params: Any, ids: Any) -> Any:
        return jnp.mean(jnp.sin(apply(jlora.attach(params, adapters), ids)))

    step = jax.value_and_grad(loss)
    rows = jax.device_put(ids, NamedSharding(mesh(*shape), ROWS))
    compiled = jax.jit(step, out_shardings=(None, at)).lower(adapters, split, rows).compile()
    found = jax.block_until_ready(compiled(adapters, split, rows))
    assert_close((adapters, found), (expected, jax.jit(step)(expected, whole, ids)))
    return compiled.as_text() or ""


@pytest.mark.slow
def test_a_decoder_split_over_every_axis(tmp_path: Path) -> None:
    """Data, fully sharded and tensor parallel at once."""
    assert_same_training("qwen3", tmp_path, (2, 2, 2), use_dora=True)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["gpt2", "bert-classifier"])
def test_fully_sharded_weights_are_gathered_and_the_batch_is_not(name: str, tmp_path: Path) -> None:
    """No device has the activations of the whole batch, 16 rows of 5 tokens."""
    options = {"train_also": ("norm", "classifier")} if "bert" in name else {}
    text = assert_same_training(name, tmp_path, (1, 8, 1), **options)
    assert "f32[2,5,16]" in text and "f32[16,5,16]" not in text


# ---- errors

SHAPES = {
    "layer": {"kernel": array(12, 8), "bias": array(8)},
    "norm": array(7),
}


def refused(*rules: Any, params: Any = SHAPES) -> str:
    return message(ValueError, lambda: jlora.shardings(params, mesh(1, 4, 2), rules))


def test_what_rules_leave_out_or_never_reach_is_named() -> None:
    """All at once: leaves without a rule, rules without a leaf, and rules that earlier ones shadow."""
    expect(
        refused(("/kernel$", P("fsdp")), ("/bais$", P()), ("layer/kernel", P())),
        "shardings: 4 problem(s) with the rules on the mesh (data=1, fsdp=4, tensor=2)",
        "'layer/bias' of shape (8,) matches no rule (closest: 'layer/kernel', '/bais$'",
        "'norm' of shape (7,) matches no rule",
        "rule '/bais$' matches no leaf (closest: 'layer/bias'",
        "rule 'layer/kernel' applies to no leaf: earlier rules match all of its leaves, such as 'layer/kernel' by ",
        "put a rule for that path before it, or use a mesh of another shape",
    )


def test_what_a_mesh_cannot_split_is_named() -> None:
    """All at once: specs that are too long, unknown or repeated mesh axes, sizes that are not divisible."""
    expect(
        refused(("kernel", P(None, ("fsdp", "tensor"))), ("bias", P("fsdp", None)), ("norm", P(("fsdp", "tensor")))),
        "2 problem(s)",
        "'layer/bias' by rule 'bias': P('fsdp', None) has 2 entries for an array of shape (8,)",
        "'norm' by rule 'norm': axis 0 of size 7 is not divisible by 8 (fsdp=4 x tensor=2)",
    )
    expect(
        refused(("kernel", P("model", "fsdp")), ("bias", ("fsdp",)), ("norm", P("fsdp", "fsdp"))),
        "3 problem(s)",
        "rule 'kernel' names 'model' in P('model', 'fsdp'); the mesh has no such axis",
        "rule 'bias' has ('fsdp',); expected a jax.sharding.PartitionSpec",
        "rule 'norm' names 'fsdp' 2 times",
    )
    assert refused(("(", P()), ("", P())).count("is not a regular expression") == 1
    plain = {"w": jnp.ones((8, 8))}
    tree = jlora.attach(plain, jlora.init(jax.random.key(0), plain, jlora.LoraConfig(rank=2, targets=("w",))))
    expect(refused(("", P()), params=tree), "'w' is attached", "jlora.detach(tree)[0]")


def test_axes_of_one_device_divide_everything() -> None:
    """Rules for a larger mesh serve on a smaller one."""
    places = jlora.shardings(SHAPES, mesh(8, 1, 1), [("", P(("fsdp", "tensor")))])
    assert places["norm"].shard_shape((7,)) == (7,)


def test_adapters_of_other_weights_are_refused() -> None:
    adapters: Any = {"w": jlora.LoraFactors(array(8, 3), array(3, 6)), "norm": array(6)}
    at = functools.partial(NamedSharding, mesh(1, 4, 2))
    refuse = lambda error, places: message(error, lambda: jlora.adapter_shardings(adapters, places))  # noqa: E731
    expect(refuse(KeyError, {"v": at(P()), "norms": at(P())}), "adapter_shardings", "'w'", "'norm' (closest: 'norms'")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expect(refuse(TypeError, {"w": at(P()), "norm": one}), "'norm': SingleDeviceSharding", "jlora.shardings(")
    expect(
        refuse(ValueError, {"w": at(P(None, "fsdp")), "norm": at(P(None, "fsdp"))}),
        "2 weight(s)",
        "'w': axis 1 of size 6 is not divisible by 4 (fsdp=4)",
        "'norm': P(None, 'fsdp') has 2 entries for an array of shape (6,)",
    )
