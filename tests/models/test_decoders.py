"""GPT-2 and the Llama-type decoder compute what transformers computes, both ways; and the laws of attention."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from tests.golden.make_decoders import CONFIGS, batch, network, states

GOLDEN = Path(__file__).parents[1] / "golden" / "decoders"
TOLERANCE = 1e-4
every_decoder = pytest.mark.parametrize("name", CONFIGS)


class Case(NamedTuple):
    model: Any
    params: Any
    expected: dict[str, np.ndarray]


@functools.cache
def case(name: str) -> Case:
    """The network of a golden folder, and what transformers computed with it."""
    return Case(*models.load(GOLDEN / name), load_file(GOLDEN / name / "expected.safetensors"))


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Any, params: Any, ids: Any, mask: Any, positions: Any = None, segments: Any = None) -> Any:
    """Logits, and the states after each layer [layers, batch, length, width], not normalized."""
    logits, sown = model.apply(params, ids, mask, positions, segments, mutable="intermediates")
    return logits, jax.tree.leaves(sown)[0]


def assert_close(got: Any, expected: Any, mask: Any = None, tolerance: float = TOLERANCE) -> None:
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    if mask is not None:
        got, expected = got[..., mask.astype(bool), :], expected[..., mask.astype(bool), :]
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@every_decoder
def test_it_computes_what_transformers_computes(name: str) -> None:
    """Logits and the states of every layer, without padding and with it on either side."""
    model, params, expected = case(name)
    mask = expected["attention_mask"]
    logits, hidden = forward(model, params, expected["input_ids"], mask)
    assert_close(logits, expected["logits"], mask)
    assert_close(hidden[:-1], expected["hidden"][:-1], mask)


@pytest.mark.sampled(4)
@every_decoder
def test_a_cache_gives_what_the_whole_gives(name: str) -> None:
    """A prompt, one row padded on the left, then token by token: the logits of one call, whatever the window."""
    model, params, expected = case(name)
    if name == "llama-dynamic":
        pytest.skip("its frequencies grow with the length, and cached keys keep theirs; as in transformers")
    rows = np.asarray([0, 2])
    ids, mask = expected["input_ids"][rows], expected["attention_mask"][rows]

    @jax.jit
    def step(ids: Any, mask: Any, cache: Any) -> Any:
        return model.apply(params, ids, mask, cache=cache)

    prompt, cache = step(ids[:, :6], mask[:, :6], model.init_cache(2, 13))
    found = [prompt]
    for i in range(6, 12):
        logits, cache = step(ids[:, i : i + 1], mask[:, i : i + 1], cache)
        found.append(logits)
    assert int(cache.length) == 12
    assert_close(jnp.concatenate(found, axis=1), expected["logits"][rows], mask)


@every_decoder
def test_a_token_sees_no_later_one_and_no_other_segment(name: str) -> None:
    """Later tokens do not change earlier logits; a packed sequence gives the logits that it gives alone."""
    model, params, expected = case(name)
    row = expected["input_ids"][0]
    changed = np.where(np.arange(12) < 8, row, 48 - row)
    ones = np.ones_like(expected["attention_mask"])
    whole, later, rolled = np.asarray(forward(model, params, np.stack([row, changed, np.roll(row, 5)]), ones)[0])
    assert_close(later[:8], whole[:8], tolerance=1e-6)
    assert np.abs(later[8:] - whole[8:]).max() > 1e-2
    if name == "llama-dynamic":
        return  # A longer call has other frequencies, so a packed sequence differs from its parts.
    packed = np.asarray(forward(model, params, row[None], ones[:1], None, np.asarray([[3] * 7 + [1] * 5]))[0])[0]
    assert_close(packed[:7], whole[:7], tolerance=1e-5)
    assert_close(packed[7:], rolled[:5], tolerance=1e-5)


@pytest.mark.sampled(4)
@every_decoder
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """A checkpoint of other weights loads; saved again, transformers computes the same, also at another length."""
    pytest.importorskip("torch", reason="compares with transformers")
    import transformers

    theirs = network(name, seed=100)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = models.load(tmp_path / "theirs")
    models.save(tmp_path / "ours", model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    ids, mask = batch(100)
    other_length = [slice(5, 10)] if name in ("llama-dynamic", "gemma2", "gpt2") else []
    for part in [slice(None), *other_length]:
        logits, hidden = states(theirs, ids[:, part], mask[:, part])
        found = forward(model, params, ids[:, part], mask[:, part])
        assert_close(found[0], logits, mask[:, part])
        assert_close(found[1][:-1], hidden[:-1], mask[:, part])
    if name != "llama-dynamic":  # which is stateful in transformers
        np.testing.assert_array_equal(states(again, ids, mask)[0], states(theirs, ids, mask)[0])


PUBLISHED = json.loads((GOLDEN.parent / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    """The config.json of models on the hub is read, and gives as many parameters as they have."""
    model = models.build(PUBLISHED[name]["config"])
    shapes = jax.tree.leaves(models.abstract(model))
    assert sum(int(np.prod(x.shape)) for x in shapes) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", ["llama2", "gemma2", "gpt2"])
def test_classification_takes_the_last_token_that_is_no_padding(name: str, tmp_path: Path) -> None:
    """As in transformers, on either side of the padding; without a padding token, by the mask."""
    model, params = models.load(GOLDEN / name, task="sequence-classification", labels=3, key=jax.random.key(0))
    assert "bias" not in params["params"]["score"]
    ids, mask = batch(7)
    apply = jax.jit(model.apply)
    scores = apply(params, ids, mask)
    assert scores.shape == (3, 3) and scores.dtype == jnp.float32
    assert_close(scores[1:2], apply(params, ids[1:2, :7]))

    hf = {**json.loads((GOLDEN / name / "config.json").read_text()), "pad_token_id": None}
    blind = models.build(hf, task="sequence-classification", labels=3)
    assert_close(jax.jit(blind.apply)(params, np.where(mask, ids, 5), mask), scores)

    pytest.importorskip("torch", reason="compares with transformers")
    import torch
    import transformers

    models.save(tmp_path, model, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(scores, theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits)


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path) -> None:
    """Both files load; an untied one that lacks its head is refused, unless a new head may start."""

    def rewrite(name: str, **changes: Any) -> Path:
        tensors = load_file(GOLDEN / name / "model.safetensors")
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((GOLDEN / name / "config.json").read_text())
        return tmp_path

    for name in ("llama3", "gpt2"):
        model, params, _ = case(name)
        (table,) = (n.files[0] for n in models.tensor_names(model).values() if n.tied)
        head = load_file(GOLDEN / name / "model.safetensors")[table]
        _, found = models.load(rewrite(name, **{"lm_head.weight": head}))
        chex.assert_trees_all_equal(found, params)
    headless = rewrite("llama2", **{"lm_head.weight": None})
    with pytest.raises(models.ModelError, match=r"lm_head.weight.*missing; pass key="):
        models.load(headless)
    assert "lm_head" in models.load(headless, key=jax.random.key(0))[1]["params"]


@pytest.mark.parametrize("name", ["llama2", "gpt2-scaled"])
def test_the_bare_network_is_that_below_the_head(name: str) -> None:
    """task="features" gives the last states, normalized."""
    model, params = models.load(GOLDEN / name, task="features")
    expected = case(name).expected
    mask = expected["attention_mask"]
    hidden = jax.jit(model.apply)(params, expected["input_ids"], mask)
    assert_close(hidden, expected["hidden"][-1], mask)


@pytest.mark.parametrize("name", ["llama2", "gemma2", "gpt2"])
def test_bfloat16_is_near(name: str) -> None:
    """Logits computed in bfloat16 are float32 and close to those in float32."""
    _, params, expected = case(name)
    model, _ = models.load(GOLDEN / name, dtype=jnp.bfloat16)
    logits, hidden = forward(model, params, expected["input_ids"], expected["attention_mask"])
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    assert_close(logits, expected["logits"], expected["attention_mask"], tolerance=0.15)


@pytest.mark.parametrize("name", ["qwen2-sliding", "gpt2"])
def test_an_adapted_decoder(name: str) -> None:
    """Every linear layer is found, with layers as a batch axis; fresh adapters change nothing; attached is merged."""
    model, params, expected = case(name)
    ids = expected["input_ids"][:1]
    uses = jlora.trace(model.apply, params, ids)
    stacked = {path for path, kind in models.tensor_names(model).items() if kind.stacked and path.endswith("kernel")}
    assert {tuple(uses[path].axes) for path in stacked} == {((0,), (1,), (2,))}  # pyright: ignore
    config = jlora.LoraConfig(rank=2, alpha=4)
    assert stacked <= set(jlora.plan(params, config, uses))

    fresh: Any = jlora.init(jax.random.key(0), params, config, uses)
    drawn = {
        path: dataclasses.replace(f, b=jax.random.normal(jax.random.key(i), f.b.shape) * 0.1)
        for i, (path, f) in enumerate(fresh.items())
    }
    apply = jlora.lora(model.apply, materialize="error")
    adapted = jax.jit(lambda params, adapters: apply(jlora.attach(params, adapters), ids))
    plain = jax.jit(lambda params: model.apply(params, ids))
    np.testing.assert_array_equal(adapted(params, fresh), plain(params))
    assert_close(adapted(params, drawn), plain(jlora.merge(params, drawn)))


def test_dropout_needs_a_key_and_differs_between_layers() -> None:
    """GPT-2 has dropout only with ``deterministic=False``."""
    model, params, expected = case("gpt2")
    ids = expected["input_ids"][:1]

    @jax.jit
    def dropped(key: Any) -> Any:
        return model.apply(params, ids, deterministic=False, rngs={"dropout": key})

    first, second = dropped(jax.random.key(0)), dropped(jax.random.key(1))
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(first, dropped(jax.random.key(0)))


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False, "beta_fast": 20.0},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
]
TINY = {"architectures": ["LlamaForCausalLM"], **CONFIGS["llama2"]}


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_positions(rope: dict[str, Any]) -> None:
    """Heads of the usual size are rotated as in transformers; both spellings in config.json are equivalent."""
    from jlora.models.decoder.rope import rotations

    size = {**TINY, "max_position_embeddings": 2048, "head_dim": 128}
    old = models.build(
        {**size, "rope_theta": 5e5, "rope_scaling": {"type": rope["rope_type"], **rope} if len(rope) > 1 else None}
    )
    new = models.build({**size, "rope_parameters": {"rope_theta": 5e5, **rope}})
    read: Any = new
    assert dataclasses.replace(read.config, hf="") == dataclasses.replace(old.config, hf="")  # pyright: ignore

    torch = pytest.importorskip("torch", reason="compares with transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = {k: v for k, v in size.items() if k not in ("model_type", "architectures")}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf, rope_parameters={"rope_theta": 5e5, **rope}))
    positions = np.asarray([[0, 1, 5, 100, 1000, 3000]])
    for found, expected in zip(
        rotations(read.config.rope, 128, jnp.asarray(positions)),
        theirs(torch.zeros(1), torch.tensor(positions)),
        strict=True,
    ):
        assert_close(found[:, :, 0], expected[..., :64], tolerance=2e-3)  # float32 angles of thousands of radians


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 4, "clip_qkv": 1.0}, r"2 attribute\(s\)(.|\n)*num_experts(.|\n)*clip_qkv"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'.*unknown; expected one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast = 1 is unknown"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"hidden_act": "gelu_10"}, "gelu_10"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding_window is not set"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "gemma2", "sliding_window": 8, "sliding_window_size": 4}, "sliding_window_size = 4.* 8"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"norm_offset": True, "rope": {}, "windows": [3]}, r"3 attribute\(s\)(.|\n)*rope = (.|\n)*windows"),
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads = 3; expected a divisor of hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3; expected a divisor of num_attention_heads"),
    ],
)
def test_what_would_compute_otherwise_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """An attribute that these networks do not have is an error, not ignored."""
    with pytest.raises(models.ModelError, match=message):
        models.abstract(models.build({**TINY, **changes}))


def test_attributes_without_effect_are_passed_over() -> None:
    """As published files have them."""
    inert = {"is_llama_config": True, "max_sequence_length": 2048, "rope_interleaved": False}
    assert models.build({**TINY, **inert, "_attn_implementation_autoset": True})
    assert models.build({**TINY, "model_type": "gemma2", "sliding_window": 8, "sliding_window_size": 8})
    assert models.build({"model_type": "gpt2", "vocab_size": 8, "n_special": 0, "predict_special_tokens": True})
    with pytest.raises(models.ModelError, match="n_head = 5; expected a divisor of n_embd = 768"):
        models.build({"model_type": "gpt2", "vocab_size": 8, "n_head": 5})


def test_calls_that_cannot_be() -> None:
    """More tokens than GPT-2 has positions or a cache has slots, and packed sequences with a cache."""
    model, params, _ = case("gpt2")
    ids = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="33 tokens, but GPT-2 has 32 positions"):
        model.apply(params, jnp.zeros((1, 33), jnp.int32))
    long = jnp.zeros((1, 33), jnp.int32)
    with pytest.raises(models.ModelError, match="33 tokens.*or pass position_ids"):
        model.apply(params, long, segment_ids=long)
    assert jax.eval_shape(lambda: model.apply(params, long, position_ids=long, segment_ids=long)).shape[1] == 33
    with pytest.raises(ValueError, match="segment_ids together with a cache"):
        model.apply(params, ids, segment_ids=ids, cache=model.init_cache(1, 8))
    with pytest.raises(ValueError, match="3 tokens for a cache of 2 slots"):
        model.apply(params, ids, cache=model.init_cache(1, 2))
