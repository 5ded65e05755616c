"""A language model's losses, all at once or in chunks, are those of its logits; and so are their derivatives."""

from __future__ import annotations

import functools
import importlib.util
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import models
from jlora.models._loss import Head, token_losses
from tests.golden.make_decoders import CONFIGS
from train.compute.compiled import Compiled
from train.compute.topology import topology_devices

TOKENS = np.random.default_rng(0).integers(3, 48, (2, 10))
LABELS = np.roll(TOKENS, -1, axis=1)
WEIGHTS = np.random.default_rng(1).random(TOKENS.shape, np.float32)  # of the losses, as a mask would be
SMOOTHING = 0.1


def loss_of_logits(logits: jax.Array, labels: Any, smoothing: float = SMOOTHING) -> jax.Array:
    """The definition: cross entropy with a smoothed label."""
    logits = logits.astype(jnp.float32)
    label = jax.nn.one_hot(labels, logits.shape[-1]) * (1 - smoothing) + smoothing / logits.shape[-1]
    return -(label * jax.nn.log_softmax(logits)).sum(axis=-1)


@functools.cache
def network(name: str) -> tuple[Any, Any]:
    model: Any = models.build(CONFIGS[name], task="causal-lm")
    # Large weights, so that logits, soft caps and gradients differ from token to token.
    shapes, key = models.abstract(model), jax.random.key(0)
    return model, jax.tree.map(lambda x: 0.5 * jax.random.normal(key, x.shape, x.dtype), shapes)


def adapted(model: Any, params: Any, config: jlora.LoraConfig) -> Any:
    """Adapters that change the model."""
    plan = jlora.plan(params, config, jlora.trace(model.apply, params, TOKENS))
    fresh = jlora.init(jax.random.key(1), params, plan)
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(moved)


def assert_losses_agree(model: Any, params: Any, config: jlora.LoraConfig, chunk: int, tolerance: float = 1e-5) -> None:
    """Losses, predictions and the gradient in everything that is trained."""
    apply = jlora.lora(model.apply, materialize="error")
    segments = np.asarray([[0] * 6 + [1] * 4, [0] * 10])

    def expected(adapters: Any) -> Any:
        logits = apply(jlora.attach(params, adapters), TOKENS, segment_ids=segments)
        losses = loss_of_logits(logits, LABELS)
        return (losses * WEIGHTS).sum(), (losses, logits.argmax(axis=-1))

    def found(adapters: Any) -> Any:
        tree = jlora.attach(params, adapters)
        options = {"labels": LABELS, "smoothing": SMOOTHING, "chunk": chunk}
        losses, predictions = apply(tree, TOKENS, segment_ids=segments, **options)
        assert losses.dtype == jnp.float32 and predictions.dtype == jnp.int32
        return (losses * WEIGHTS).sum(), (losses, predictions)

    adapters = adapted(model, params, config)
    one, two = (jax.jit(jax.value_and_grad(fn, has_aux=True))(adapters) for fn in (expected, found))
    assert jax.tree.leaves(one[1])
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance * float(jnp.abs(x).max()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    """In chunks that do not divide the length, with adapters on every linear layer but the head."""
    assert_losses_agree(*network(name), jlora.LoraConfig(rank=2), chunk=4)


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapted": ("llama2", {"targets": ("lm_head", "q_proj"), "exclude": ()}),
    "adapted with DoRA": ("llama2", {"targets": ("lm_head", "q_proj"), "exclude": (), "use_dora": True}),
    "adapted alone": ("llama2", {"targets": ("lm_head",), "exclude": ()}),
    "trained": ("llama2", {"targets": ("q_proj",), "train_also": ("lm_head",)}),
    "tied and adapted, with a soft cap": ("gemma2", {"targets": ("embed_tokens", "q_proj")}),
    "tied and trained, with a soft cap": ("gemma2", {"targets": ("q_proj",), "train_also": ("embed_tokens",)}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [4, 10])
def test_adapted_and_trained_heads(head: str, chunk: int) -> None:
    """An adapted head stays factored: `materialize="error"` would refuse its sum."""
    name, options = HEADS[head]
    assert_losses_agree(*network(name), jlora.LoraConfig(rank=2, **options), chunk)


def test_dropout_in_an_adapted_head_has_the_derivative_of_its_masks() -> None:
    """Each chunk has its own mask, the same in both passes: the gradient is that of finite differences."""
    model, params = network("llama2")
    adapters = adapted(model, params, jlora.LoraConfig(rank=2, targets=("lm_head",), exclude=(), dropout=0.4))
    apply = jlora.lora(model.apply, materialize="error")

    def loss(adapters: Any) -> jax.Array:
        tree = jlora.attach(params, adapters, dropout_key=jax.random.key(3))
        return (apply(tree, TOKENS, labels=LABELS, chunk=4).loss * WEIGHTS).sum()

    gradient = jax.grad(loss)(adapters)
    step = jax.tree.map(lambda g: 1e-3 * g / jnp.abs(g).max(), gradient)
    ahead, behind = (loss(jax.tree.map(lambda x, d: x + sign * d, adapters, step)) for sign in (1, -1))  # noqa: B023
    expected = 2 * sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True))
    assert float(ahead - behind) == pytest.approx(float(expected), rel=2e-2)


def test_labels_change_no_role_of_a_weight() -> None:
    """`jlora.trace` sees the same uses through the losses of chunks as through the logits."""
    model, params = network("llama2")
    logits = jlora.plan(params, jlora.LoraConfig(exclude=()), jlora.trace(model.apply, params, TOKENS))
    losses = functools.partial(model.apply, labels=LABELS, chunk=4)
    assert str(jlora.plan(params, jlora.LoraConfig(exclude=()), jlora.trace(losses, params, TOKENS))) == str(logits)


# The head alone


def operands(rng: random.Random, rows: int, length: int, tied: bool, dtype: Any) -> tuple[Any, Any, Any]:
    width, vocabulary = 5, 11
    keys = jax.random.split(jax.random.key(rng.randrange(1000)), 3)
    x = jax.random.normal(keys[0], (rows, length, width), dtype)
    weight = jax.random.normal(keys[1], (vocabulary, width) if tied else (width, vocabulary), dtype)
    return x, weight, jax.random.randint(keys[2], (rows, length), 0, vocabulary)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(12))
def test_any_chunk_gives_the_losses_and_the_derivatives_of_the_logits(seed: int) -> None:
    """Whatever the length, the chunk (dividing it or not), the dtype, cap and smoothing; also in forward mode and under
    `jax.vmap`."""
    rng = random.Random(seed)
    rows, length, chunk = rng.randint(1, 3), rng.randint(1, 13), rng.randint(1, 14)
    dtype, tolerance = rng.choice([(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
    head, smoothing = Head(rng.random() < 0.5, rng.choice([None, 2.0])), rng.choice([0.0, 0.2])
    x, weight, labels = operands(rng, rows, length, head.tied, dtype)
    scale = jax.random.normal(jax.random.key(seed), labels.shape)

    def expected(x: Any, weight: Any) -> Any:
        return (scale * loss_of_logits(head.logits(x, weight), labels, smoothing)).sum()

    def found(x: Any, weight: Any) -> Any:
        return (scale * token_losses(x, weight, labels, head, smoothing=smoothing, chunk=chunk).loss).sum()

    def assert_close(x: Any, y: Any) -> None:
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance * max(np.abs(x).max(), 1e-3))

    for argnums in (0, 1, (0, 1)):
        one, two = (jax.jit(jax.value_and_grad(fn, argnums))(x, weight) for fn in (expected, found))
        jax.tree.map(assert_close, one, two)
    tangents = jax.random.normal(jax.random.key(1), x.shape, dtype), jnp.ones_like(weight)
    jax.tree.map(assert_close, *(jax.jvp(fn, (x, weight), tangents) for fn in (expected, found)))
    several = jnp.stack([x, -x])
    jax.tree.map(assert_close, *(jax.vmap(jax.grad(fn), (0, None))(several, weight) for fn in (expected, found)))


def test_the_second_derivative() -> None:
    head, (x, weight, labels) = Head(False, 3.0), operands(random.Random(0), 1, 5, False, jnp.float32)
    of_logits = jax.hessian(lambda x: loss_of_logits(head.logits(x, weight), labels).sum())(x)
    options: dict[str, Any] = {"smoothing": SMOOTHING, "chunk": 2}
    of_chunks = jax.hessian(lambda x: token_losses(x, weight, labels, head, **options).loss.sum())(x)
    np.testing.assert_allclose(of_chunks, of_logits, rtol=1e-4, atol=1e-5)


def test_many_chunks_sum_the_gradient_of_a_weight_in_float32() -> None:
    """In bfloat16, 512 summands would be off by percents."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, ((1, 512, 4), (4, 8)), strict=True))
    x, labels = jnp.abs(x), jnp.zeros((1, 512), int)

    def gradient(chunk: int, dtype: Any) -> Any:
        def total(weight: Any) -> Any:
            losses = token_losses(x.astype(dtype), weight, labels, Head(False, None), smoothing=0.0, chunk=chunk)
            return losses.loss.sum()

        return np.asarray(jax.jit(jax.grad(total))(weight.astype(dtype)), np.float32)

    np.testing.assert_allclose(gradient(1, jnp.bfloat16), gradient(512, jnp.bfloat16), rtol=5e-3)


# Memory and meshes

VOCABULARY = 128_256


def compiled(rows: int, length: int, mesh: Any = None, *, trained: bool = False) -> Any:
    """The losses of a head with a large vocabulary and their gradient, compiled."""

    def shape(size: tuple[int, ...], dtype: Any, *spec: Any) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=None if mesh is None else NamedSharding(mesh, P(*spec)))

    split = ("data", "fsdp")
    x, labels = shape((rows, length, 8), jnp.float32, split), shape((rows, length), jnp.int32, split)
    weight = shape((8, VOCABULARY), jnp.float32, "fsdp", "tensor")

    def step(x: Any, weight: Any, labels: Any) -> Any:
        def total(x: Any, weight: Any) -> Any:
            losses = token_losses(x, weight, labels, Head(False, None), smoothing=0.1, chunk=None)
            return losses.loss.mean(), losses.prediction

        return jax.value_and_grad(total, (0, 1) if trained else 0, has_aux=True)(x, weight)

    return jax.jit(step).lower(x, weight, labels).compile()


@pytest.mark.parametrize("trained", [False, True])
def test_memory_does_not_grow_with_the_number_of_tokens(trained: bool) -> None:
    """All logits of 16,384 tokens would be 8.4 GB; a chunk's are 263 MB, and its derivatives as much."""
    few, many = (Compiled(compiled(1, length, trained=trained)) for length in (2048, 16384))
    assert many.temp_bytes < few.temp_bytes + 20 * 16384 * 8
    assert many.temp_bytes < 2.2 * 512 * VOCABULARY * 4
    assert many.largest(1)[0].bytes == 512 * VOCABULARY * 4


def assert_split(axes: tuple[int, int, int], devices: Any = None) -> None:
    """Each device has the logits of its rows and its part of the vocabulary. It gathers its part of the weight."""
    mesh = jax.make_mesh(axes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
    found, own = Compiled(compiled(8, 2048, mesh)), VOCABULARY // axes[2]
    assert found.largest(1)[0].bytes == 512 * own * 4
    predictions = 2 * 8 * 2048 * axes[2] * 4  # those of the parts of the vocabulary, with their logits
    assert 8 * own * 2 <= found.collectives["all-gather"] <= 8 * own * 4 + predictions  # a TPU gathers it in bfloat16


@pytest.mark.parametrize("axes", [(2, 4, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_a_split_vocabulary_is_never_gathered(axes: tuple[int, int, int]) -> None:
    assert_split(axes)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_nor_on_a_tpu() -> None:
    assert_split((1, 4, 2), topology_devices("v5e:2x4"))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_stays_split_and_factored(tied: bool) -> None:
    """On a mesh, in chunks: the losses and gradients of one device."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    keys = jax.random.split(jax.random.key(0), 3)
    x, params = jax.random.normal(keys[0], (4, 6, 8)), {"w": jax.random.normal(keys[1], (16, 8) if tied else (8, 16))}
    labels = jax.random.randint(keys[2], (4, 6), 0, 16)

    def losses(params: Any, x: Any, labels: Any) -> Any:
        return token_losses(x, params["w"], labels, Head(tied, None), smoothing=0.1, chunk=2).loss

    config = jlora.LoraConfig(rank=2, targets=("w",))
    adapters = jlora.init(keys[0], params, config, jlora.trace(losses, params, x, labels))
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)

    @jax.jit
    def step(adapters: Any, params: Any, x: Any, labels: Any) -> Any:
        apply = jlora.lora(losses, materialize="error")
        return jax.value_and_grad(lambda a: apply(jlora.attach(params, a), x, labels).mean())(adapters)

    rows, split = P(("data", "fsdp")), {"w": NamedSharding(mesh, P("tensor", "fsdp") if tied else P("fsdp", "tensor"))}
    places = jlora.adapter_shardings(adapters, split), split, NamedSharding(mesh, rows), NamedSharding(mesh, rows)
    found = step(*map(jax.device_put, (adapters, params, x, labels), places))
    for one, two in zip(jax.tree.leaves(step(adapters, params, x, labels)), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mesh_gives_what_one_device_gives(tied: bool) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (4, 6, 8)), jax.random.normal(keys[1], (16, 8) if tied else (8, 16))
    labels = jax.random.randint(keys[2], (4, 6), 0, 16)

    @jax.jit
    def step(x: Any, weight: Any, labels: Any) -> Any:
        def total(x: Any, weight: Any) -> Any:
            losses = token_losses(x, weight, labels, Head(tied, None), smoothing=0.1, chunk=2)
            return losses.loss.mean(), losses

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, weight)

    rows, split = P(("data", "fsdp")), P("tensor", "fsdp") if tied else P("fsdp", "tensor")
    places = [NamedSharding(mesh, spec) for spec in (rows, split, rows)]
    found = step(*map(jax.device_put, (x, weight, labels), places))
    for one, two in zip(jax.tree.leaves(step(x, weight, labels)), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
