"""BERT, RoBERTa and ViT compute what transformers computes, from its checkpoints and with ours."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import models
from tests.golden.make_encoders import CONFIGS, HERE, MINILM, PARTS, SHARED, batches, compute, network, tokenized

TOLERANCE = 1e-4
every_encoder = pytest.mark.parametrize("name", CONFIGS)
needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="compares with torch and transformers"
)
needs_minilm = pytest.mark.skipif(not MINILM.is_dir(), reason=f"there is no {MINILM}")


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Any, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """As `golden.make_encoders.compute`."""
    out, sown = model.apply(params, **batch, mutable="intermediates")
    layers = sown["intermediates"].get("encoder", sown["intermediates"])
    hidden = jnp.stack([layers[f"layer_{i}"]["hidden"][0] for i in range(len(layers))])
    return {"hidden": hidden, **({"logits": out} if isinstance(out, jax.Array) else {"last": out[0], "pooled": out[1]})}


def farthest(got: dict[str, jax.Array], expected: dict[str, np.ndarray], batch: dict[str, np.ndarray]) -> float:
    """The largest difference at positions that are not padding."""
    assert set(got) == set(expected)
    seen = batch.get("attention_mask")
    differences = []
    for name, value in expected.items():
        difference = np.abs(np.asarray(got[name], np.float32) - value)
        assert got[name].shape == value.shape
        differences.append(difference[..., seen.astype(bool), :] if seen is not None and value.ndim > 2 else difference)
    return max(float(np.max(d)) for d in differences)


def recorded(name: str) -> dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The batches of a golden folder, and what transformers computed with them."""
    found: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    for key, value in load_file(HERE / name / "expected.safetensors").items():
        sort, side, what = key.split("/")
        found.setdefault(sort, ({}, {}))[side == "out"][what] = value
    return found


@pytest.mark.sampled(4)
@every_encoder
def test_it_computes_what_transformers_computed(name: str) -> None:
    """Logits, pooled and every layer's states, for each length, padding, token types, positions; no torch needed."""
    model, params = models.load(HERE / name)
    for sort, (batch, expected) in recorded(name).items():
        assert farthest(forward(model, params, batch), expected, batch) < TOLERANCE, sort


@pytest.mark.sampled(4)
@needs_torch
@every_encoder
def test_it_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """The same with the transformers that is installed and other weights; and transformers reads what `save` wrote."""
    theirs = network(name, seed=100)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = models.load(tmp_path / "theirs")
    for sort, batch in batches(name, seed=100).items():
        assert farthest(forward(model, params, batch), compute(theirs, batch), batch) < TOLERANCE, sort
    models.save(tmp_path / "ours", model, params)
    again, told = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    assert all(bool((x == y).all()) for x, y in zip(theirs.parameters(), again.parameters(), strict=True))
    assert again.config.to_diff_dict() == {**theirs.config.to_diff_dict(), "dtype": "float32"}


@needs_torch
@pytest.mark.parametrize("kind", ["bert", "roberta", "vit"])
def test_what_a_config_leaves_out_is_as_in_transformers(kind: str) -> None:
    from transformers import AutoConfig

    ours, theirs = models.build({"model_type": kind}).config, AutoConfig.for_model(kind)  # type: ignore[attr-defined]
    derived = {"hf", "generation", "roberta", "pooler_output_size"}  # config.json has no attributes by these names
    fields = [f for f in ours.__dataclass_fields__ if f not in derived]
    assert {f: getattr(ours, f) for f in fields} == {f: getattr(theirs, f) for f in fields}


@pytest.mark.parametrize("name", ["bert-classifier", "vit-classifier"])
def test_bfloat16_stays_near(name: str) -> None:
    """Computed in bfloat16, from float32 or bfloat16 parameters, everything is within a few bfloat16 roundings."""
    for param_dtype in (jnp.float32, jnp.bfloat16):
        model, params = models.load(HERE / name, dtype=jnp.bfloat16, param_dtype=param_dtype)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
        for sort, (batch, expected) in list(recorded(name).items())[-1:]:
            got = forward(model, params, batch)
            scale = max(float(np.abs(value).max()) for value in expected.values())
            assert all(x.dtype == jnp.bfloat16 for x in got.values())
            assert farthest(got, expected, batch) < 0.05 * scale, sort


@pytest.mark.parametrize("name", ["roberta-classifier", "vit-classifier"])
def test_dropout_needs_a_key_and_changes_the_output(name: str) -> None:
    hf = json.loads((HERE / name / "config.json").read_text())
    model = models.build({**hf, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5})
    params = models.load(HERE / name)[1]
    drop = jax.jit(lambda key: model.apply(params, models.example_inputs(model), deterministic=False, rngs=key))
    first, again, other = (drop({"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    assert first.shape == (1, 3)
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_a_row_longer_than_the_positions_is_refused() -> None:
    """Instead of NaN. RoBERTa's first positions are for padding; explicit position_ids are used as given."""
    for name, least in (("bert-classifier", 0), ("roberta-classifier", 1)):
        hf = json.loads((HERE / name / "config.json").read_text())
        model = models.build(hf)
        most = model.config.max_length  # pyright: ignore[reportAttributeAccessIssue]
        assert most == hf["max_position_embeddings"] - least * (1 + hf["pad_token_id"])
        params = models.load(HERE / name)[1]
        ids = jnp.full((1, most + 1), 5)
        assert np.isfinite(model.apply(params, ids[:, 1:])).all()  # pyright: ignore
        with pytest.raises(
            models.ModelError, match=rf"{most + 1} tokens, but .* has {most} positions; expected at most"
        ):
            model.apply(params, ids)
        assert jax.eval_shape(lambda m=model, p=params, i=ids: m.apply(p, i, position_ids=0 * i)).shape == (1, 3)


@pytest.mark.parametrize("offset", [0.0, 100.0, 3000.0])
def test_a_layer_norm_survives_a_large_mean(offset: float) -> None:
    """Near float64; the mean of squares less the square of the mean would cancel."""
    from jlora.models._layers import layer_norm

    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) + np.float32(offset)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-12)
    norm = layer_norm(1e-12)
    found = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_images_of_another_size_are_refused() -> None:
    model, params = models.load(HERE / "vit")
    with pytest.raises(
        models.ModelError, match=r"\(1, 3, 12, 12\); expected \[batch, height, width, channels\].*12, 3"
    ):
        model.apply(params, jnp.zeros((1, 3, 12, 12)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": [12, 16]}, r"image_size = \[12, 16\]; expected one number"),
        ({"patch_size": 13}, "patch_size = 13; expected at most image_size = 12"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3; expected a divisor of hidden_size = 16"),
        ({"pool_size": 2, "qkv_bais": True}, r"2 attribute.*\n.*pool_size = 2 is unknown.*\n.*qkv_bais.*'qkv_bias'"),
        ({"hidden_act": "relu6"}, "hidden_act = 'relu6'; expected one of gelu"),
    ],
)
def test_what_a_vit_cannot_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    hf = json.loads((HERE / "vit" / "config.json").read_text())
    with pytest.raises(models.ModelError, match=message):
        models.abstract(models.build({**hf, **change}))


@needs_minilm
def test_a_real_checkpoint_computes_what_transformers_computed() -> None:
    """A part of the states of every layer of MiniLM, for four sentences; no torch needed."""
    model, params = models.load(MINILM)
    stored = load_file(HERE / "minilm-l6.safetensors")
    batch = {name: stored.pop(name) for name in ("input_ids", "attention_mask")}
    got = forward(model, params, batch)
    assert farthest({"hidden": got["hidden"][..., :PARTS], "pooled": got["pooled"]}, stored, batch) < TOLERANCE


@needs_torch
@needs_minilm
def test_a_real_checkpoint_computes_what_transformers_computes() -> None:
    """MiniLM on 64 sentences of SST-2: every state of every layer."""
    from transformers import BertModel

    lines = (SHARED / "data" / "sst2" / "validation.jsonl").read_text().splitlines()[:64]
    batch = tokenized([json.loads(line)["sentence"] for line in lines])
    model, params = models.load(MINILM)
    expected = compute(BertModel.from_pretrained(MINILM).eval(), batch)
    assert farthest(forward(model, params, batch), expected, batch) < TOLERANCE
