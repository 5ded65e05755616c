"""Every form of attention computes what the plain one does, and only the plain one holds all scores."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.models.attention import attend as dispatch
from jlora.models.attention import chunked as chunks
from jlora.models.attention import gpu, mask, tpu
from jlora.models.attention.attend import attend
from jlora.models.attention.mask import Mask, make_mask
from jlora.models.attention.plain import Scoring
from tests.golden.make_decoders import CONFIGS
from tests.golden.make_encoders import CONFIGS as ENCODERS
from tests.golden.make_encoders import HERE as ENCODERS_HERE
from tests.messages import expect, message
from tests.tiny import DECODER

GOLDEN = Path(__file__).parents[1] / "golden" / "decoders"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several."""
    monkeypatch.setattr(chunks, "_SCORES", 2**9)


# One attention


def draw(seed: int, dtype: Any, length: int) -> tuple[list[Any], dict[str, Any], Scoring, Any]:
    """Queries, keys, values and a cotangent; a mask's arguments; a scoring; the queries that are not padding."""
    rng = np.random.default_rng(seed)
    batch, kv, groups, dim = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 4), 8 * rng.integers(1, 3)
    shapes = [(batch, length, heads, dim) for heads in (kv * groups, kv, kv, kv * groups)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    causal = bool(rng.integers(4))
    options: dict[str, Any] = {"causal": causal, "windows": (int(rng.integers(1, length + 9)) if causal else None,)}
    if rng.integers(2):
        options["windows"] = (None,)
    index, count = np.arange(length), rng.integers(1, length + 1, size=(batch, 1))
    real = [np.ones((batch, length), bool), index < count, index >= length - count][rng.integers(3)]
    if rng.integers(4):
        options["real"] = jnp.asarray(real)
    if causal and rng.integers(2):
        options["segments"] = jnp.asarray(np.sort(rng.integers(1, 5, size=(batch, length)), axis=1))
    softcap = 5.0 if rng.integers(3) == 0 else None
    return arrays, options, Scoring(dim**-0.5, softcap), real[:, :, None, None]


def assert_equal_to_plain(form: Any, seed: int, dtype: Any, length: int) -> None:
    """The result and the gradients of a form, against the plain one's in float32."""
    (*operands, cotangent), options, scoring, real = draw(seed, dtype, length)
    (window,) = options["windows"]

    def results(fn: Any, *operands: Any) -> Any:
        out, pullback = jax.vjp(fn, *operands)
        return jnp.where(real, out, 0), *pullback(jnp.where(real, cotangent, 0).astype(out.dtype))

    plain = make_mask(jnp.zeros(()), length, length, form="plain", **options)
    expected = jax.jit(functools.partial(results, lambda q, k, v: attend(q, k, v, plain, scoring)))(
        *(x.astype(jnp.float32) for x in operands)
    )
    flash = make_mask(jnp.zeros(()), length, length, form="flash", **options)
    got = jax.jit(functools.partial(results, lambda *a: form(*a, flash, window, scoring)))(*operands)
    for name, ours, theirs in zip(("result", "query", "key", "value"), got, expected, strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(
            np.asarray(ours, np.float32) / scale, theirs / scale, atol=TOLERANCES[dtype], err_msg=f"{name} {options}"
        )


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seed", range(10))
def test_chunks_equal_the_plain_form(seed: int, dtype: Any) -> None:
    """Padding on either side, packed segments, windows, soft caps, grouped heads, lengths that no chunk divides."""
    assert_equal_to_plain(chunks.chunked, seed, dtype, length=20 + 7 * seed)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seed", range(100, 104))
def test_the_tpu_kernel_equals_the_plain_form(seed: int, dtype: Any) -> None:
    """Interpreted on this machine, at lengths that its blocks do not divide."""
    assert_equal_to_plain(functools.partial(tpu.splash, interpret=True), seed, dtype, length=130 + 20 * (seed % 4))


def cudnn_draws(count: int) -> list[int]:
    """Seeds whose draws cuDNN would compute."""

    def fits(seed: int) -> bool:
        arrays, options, scoring, _ = draw(seed, jnp.bfloat16, 24)
        return gpu.fits(
            arrays[0], make_mask(jnp.zeros(()), 24, 24, form="flash", **options), options["windows"][0], scoring
        )

    return list(itertools.islice(filter(fits, itertools.count(200)), count))


def test_what_is_given_to_cudnn_equals_the_plain_form() -> None:
    """The same call without cuDNN: no padding or on either side, causal or not, with and without a window."""
    for seed in cudnn_draws(8):
        assert_equal_to_plain(functools.partial(gpu.cudnn, implementation="xla"), seed, jnp.float32, 24)


def test_gpus_take_cudnn_where_it_fits() -> None:
    """Half precision, heads of at most 128; not for packed segments, soft caps, or windows with padding."""
    x, plain = jnp.zeros((2, 8, 2, 64), jnp.bfloat16), {"causal": True, "form": "flash"}
    ones, scoring = jnp.ones((2, 8), bool), Scoring(0.125)

    def fits(x: Any = x, scoring: Scoring = scoring, window: int | None = None, **options: Any) -> bool:
        return gpu.fits(x, make_mask(jnp.zeros(()), 8, 8, **plain, **options), window, scoring)

    assert fits() and fits(real=ones) and fits(window=4)
    assert not fits(x.astype(jnp.float32)) and not fits(jnp.zeros((2, 8, 2, 256), jnp.bfloat16))
    assert not fits(segments=ones) and not fits(scoring=Scoring(0.125, 30.0)) and not fits(real=ones, window=4)


def test_the_platform_is_that_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their mesh, or of the default device, whatever else JAX has."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    x, mesh = jnp.zeros(8), jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    found = [mask.platform_of(x), mask.platform_of(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))]
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            found.append(mask.platform_of(x))
    assert found == ["tpu", "cpu", "cpu", "cpu"] and not gpu.has_cudnn()


def test_dropout_drops_its_share_of_the_weights() -> None:
    """In chunks too, each with masks of its own; the expectation stays."""
    query = key = jnp.zeros((2, 64, 2, 8))
    value = jnp.ones((2, 64, 2, 8))
    scoring = Scoring(1.0, None, 0.5, jax.random.key(0))
    for form in ("plain", "flash"):
        out = attend(query, key, value, make_mask(jnp.zeros(()), 64, 64, causal=False, form=form), scoring)
        rows = np.asarray(out[..., 0]).ravel()
        assert abs(rows.mean() - 1) < 0.05 and 0.08 < rows.std() < 0.17 and len(np.unique(rows.round(4))) > 20, form


# Networks


def adapted(model: Any, params: Any, config: jlora.LoraConfig, *inputs: Any, **named: Any) -> Any:
    """``(model) -> (outputs, gradient)`` of adapters that are not zero."""
    adapters = jlora.init(jax.random.key(1), params, config, jlora.trace(model.apply, params, *inputs, **named))
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    start = treedef.unflatten(moved)

    def run(model: Any, weight: Any) -> Any:
        apply = jlora.lora(model.apply)

        def loss(adapters: Any) -> Any:
            out = apply(jlora.attach(params, adapters), *inputs, **named)
            out = jax.tree.leaves(out)[0]
            return jnp.sum(jnp.sin(3 * out.astype(jnp.float32)) * weight), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(start)

    return run


def assert_same(got: Any, expected: Any, weight: Any) -> None:
    (_, ours), gradient = got
    (_, theirs), wanted = expected
    np.testing.assert_allclose(ours * weight, theirs * weight, atol=1e-4, rtol=1e-4)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one / largest, two / largest, atol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_computes_the_same_without_all_scores(name: str) -> None:
    """Each family: what transformers computed, with padding on either side; and the gradients of adapters of every
    linear layer and table, packed too."""
    model, params = models.load(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids, real = jnp.asarray(expected["input_ids"]), expected["attention_mask"]
    flash = model.clone(attention="flash")
    logits = jax.jit(flash.apply)(params, ids, real)
    weight = real[:, :, None]
    np.testing.assert_allclose(logits * weight, expected["logits"] * weight, atol=1e-4, rtol=1e-4)
    segments = np.asarray([[1] * 5 + [2] * 4 + [3] * 3] * len(ids))
    everything = jlora.LoraConfig(rank=2, targets="all-linear")
    for named in ({"attention_mask": real}, {"segment_ids": segments}):
        if name == "llama-dynamic" and "segment_ids" in named:
            continue  # its frequencies depend on the length
        run = adapted(model, params, everything, ids, **named)
        weight = real[:, :, None] if "attention_mask" in named else np.ones((*ids.shape, 1))
        assert_same(run(flash, weight), run(model.clone(attention="plain"), weight), weight)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama3", "mistral"])
def test_a_prompt_fills_the_cache_without_all_scores(name: str) -> None:
    """And the tokens that follow are the same."""
    model, params = models.load(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids, real = expected["input_ids"][[0, 2]], expected["attention_mask"][[0, 2]]
    plain, flash = (
        models.generate(model.clone(attention=form), params, ids, real, max_new_tokens=6) for form in ("plain", "flash")
    )
    np.testing.assert_array_equal(flash, plain)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "minilm"])
def test_an_encoder_computes_the_same_without_all_scores(name: str) -> None:
    """Each family, with padding where it takes a mask: outputs and the gradients of adapters of all linear layers."""
    tensors = load_file(ENCODERS_HERE / name / "expected.safetensors")
    batch: dict[str, Any] = {}
    for path, value in tensors.items():
        sort, side, what = path.split("/")
        if side == "in" and sort == next(iter(tensors)).split("/")[0]:
            batch[what] = jnp.asarray(value)
    model, params = models.load(ENCODERS_HERE / name)
    run = adapted(model, params, jlora.LoraConfig(rank=2, targets="all-linear"), **batch)
    out = jax.eval_shape(lambda p: jax.tree.leaves(model.apply(p, **batch))[0], params)
    real = batch.get("attention_mask")
    weight = np.ones(out.shape) if out.ndim < 3 or real is None else np.broadcast_to(real[:, :, None], out.shape)
    assert_same(run(model.clone(attention="flash"), weight), run(model.clone(attention="plain"), weight), weight)


def test_only_long_sequences_are_computed_without_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default; the scores of shorter ones are held, as that is faster."""
    seen: list[Mask] = []
    real = dispatch.attend
    monkeypatch.setattr("jlora.models.decoder.modeling.attend", lambda *a: seen.append(a[3]) or real(*a))
    model = models.build(DECODER, task="causal-lm")
    params = models.abstract(model)
    for length in (mask.SHORTEST["cpu"] - 1, mask.SHORTEST["cpu"]):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        for form, expected in (("auto", length >= mask.SHORTEST["cpu"]), ("plain", False), ("flash", True)):
            seen.clear()
            text = str(jax.make_jaxpr(model.clone(attention=form).apply)(params, ids))
            assert seen[0].flash == expected, (length, form)
            assert (f"{length},{length}]" in text) != expected, (length, form)


def test_an_unknown_form_is_refused() -> None:
    model = models.build(DECODER, task="causal-lm").clone(attention=True)
    expect(
        message(models.ModelError, lambda: models.abstract(model)), "attention = True", "'auto'", "'plain'", "'flash'"
    )


def total(logits: Any) -> jax.Array:
    return jnp.sum(jnp.sin(logits))


def step_memory(length: int, **options: Any) -> int:
    """Temporary bytes of a gradient of adapters on this machine, one row of ``length`` tokens."""
    model = models.build(DECODER, task="causal-lm", remat="full", **options)
    params, ids = models.abstract(model), jax.ShapeDtypeStruct((1, length), jnp.int32)
    config = jlora.LoraConfig(rank=2, targets="all-linear")
    uses = jlora.trace(model.apply, params, ids)
    adapters = jax.eval_shape(lambda p: jlora.init(jax.random.key(0), p, config, uses), params)
    apply = jlora.lora(model.apply)

    def loss(adapters: Any, params: Any, ids: Any) -> Any:
        return total(apply(jlora.attach(params, adapters), ids))

    memory: Any = jax.jit(jax.grad(loss)).lower(adapters, params, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_length_not_with_its_square() -> None:
    """16,384 tokens on this machine."""
    assert step_memory(16384) < 2.2 * step_memory(8192)
    assert step_memory(16384) < step_memory(4096, attention="plain")


# Compiled for a TPU


@needs_libtpu
def test_each_device_of_a_mesh_runs_the_kernels_on_a_tpu() -> None:
    """8 x 2048 tokens on fsdp x tensor = 4 x 2, windows and full layers: no scores, and no head leaves its device."""
    from train.compute.compiled import Compiled
    from train.compute.topology import topology_devices

    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = {**DECODER, **sizes, "model_type": "gemma2", "intermediate_size": 512, "num_hidden_layers": 2}
    gemma |= {"sliding_window": 512, "query_pre_attn_scalar": 64, "final_logit_softcapping": None}
    model = models.build(gemma, task="causal-lm", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    axes = ("data", "fsdp", "tensor")
    devices = topology_devices("v5e:2x4")
    mesh = jax.make_mesh((1, 4, 2), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
    places = jlora.shardings(models.abstract(model), mesh, models.sharding_rules(model))

    def placed(shape: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    params = jax.tree.map(placed, models.abstract(model), places)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=rows)

    def loss(params: Any, ids: Any, real: Any) -> Any:
        return total(model.apply(params, ids, real))

    compiled = jax.jit(jax.grad(loss), out_shardings=places).lower(params, ids, ids).compile()
    text = compiled.as_text() or ""
    assert not re.search(r"\[[\d,]*2048,2048[\d,]*\]", text)
    kernels = Compiled(compiled).kernels
    # Two layers, two of the four heads and two of the eight rows on each device; the products of a kernel.
    products = {"fwd_segmented_residuals": 2, "dq_segmented_no_residuals": 3, "dkv_segmented_no_residuals": 4}
    assert kernels == {f"splash_mha_{name}": 2 * 2 * 2 * n * 2048**2 * 64 for name, n in products.items()}
