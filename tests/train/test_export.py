"""`jlora.models.export`: a merged checkpoint that stands alone, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import models
from tests.messages import expect, message
from tests.small_checkpoints import network, same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_merged_network_with_its_tokenizer_and_card(dtype: str, tmp_path: Path) -> None:
    model, params = network(dtype)
    adapters = adapted(params)
    words = tmp_path / "tokenizer"
    words.mkdir()
    (words / "vocab.txt").write_text("a\n")
    (words / "secrets.txt").write_text("mine")
    out = tmp_path / "out"
    report = models.export(
        out, model, params, adapters, tokenizer=words, base_model="some/base: #1", max_shard_bytes=9000
    )
    assert same(models.load(out)[1], jlora.merge(params, adapters))
    assert report == jlora.rounding(params, adapters)
    assert (out / "vocab.txt").read_text() == "a\n" and not (out / "secrets.txt").exists()
    card = (out / "README.md").read_text()
    expect(
        card, "---\nbase_model: 'some/base: #1'\nlibrary_name: transformers\ntags:\n- lora\n- jlora\n---\n", str(report)
    )
    expect(
        card, "low-rank updates of 4 weights, rank 2", "- 2 leaves trained whole", "AutoModelForSequenceClassification"
    )
    models.export(out, model, params, adapters, tokenizer=out)  # over itself
    assert "base_model" not in (out / "README.md").read_text() and (out / "vocab.txt").exists()


def test_export_takes_a_tokenizer_that_saves_itself(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    model, params = network()
    models.export(tmp_path, model, params, adapted(params), tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_export_leaves_a_foreign_readme_alone(tmp_path: Path) -> None:
    model, params = network()
    (tmp_path / "README.md").write_text("# Mine\n")
    text = message(models.ModelError, lambda: models.export(tmp_path, model, params, adapted(params)))
    expect(text, "README.md was not written by jlora", "export into a new folder")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_export_brings_what_belongs_to_generation_and_a_padding_token(tmp_path: Path) -> None:
    """Of a tokenizer's folder or object; a token that the network does not have is no padding."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = models.build(gpt2, task="sequence-classification")
    params = jax.jit(model.init)(jax.random.key(0), models.example_inputs(model))
    params = {"params": params["params"]}
    uses = jlora.trace(model.apply, params, models.example_inputs(model))
    adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=1, targets=("c_fc",)), uses)
    words = tmp_path / "words"
    words.mkdir()
    for name, content in {
        "tokenizer_config.json": {"pad_token": {"content": "<pad>"}},
        "tokenizer.json": {"added_tokens": [{"content": "<pad>", "id": 3}]},
        "generation_config.json": {},
        "chat_template.json": {},
    }.items():
        (words / name).write_text(json.dumps(content))

    class Tokenizer:
        def __init__(self, pad: int):
            self.pad_token_id = pad

        def save_pretrained(self, folder: Path) -> None: ...

    for tokenizer, pad in ((words, 3), (Tokenizer(5), 5), (Tokenizer(16), None), (None, None)):
        out = tmp_path / f"out-{pad}"
        models.export(out, model, params, adapters, tokenizer=tokenizer)
        assert json.loads((out / "config.json").read_text()).get("pad_token_id") == pad
        assert tokenizer is not words or {"generation_config.json", "chat_template.json"} <= {
            file.name for file in out.iterdir()
        }


def test_a_language_model_keeps_how_it_generates(tmp_path: Path) -> None:
    """`save` and `export` write the generation_config.json of the folder that it is from, and none stays behind."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    made = models.build(gpt2, task="causal-lm")
    models.save(tmp_path / "base", made, {"params": made.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]})
    assert not (tmp_path / "base" / "generation_config.json").exists()
    stated = {"eos_token_id": [3, 5], "temperature": 0.6}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stated))

    model, params = models.load(tmp_path / "base")
    uses = jlora.trace(model.apply, params, models.example_inputs(model))
    adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=1, targets=("c_fc",)), uses)
    out = tmp_path / "out"
    for one in (model, models.build(tmp_path / "base")):
        models.export(out, one, params, adapters)
        assert json.loads((out / "generation_config.json").read_text()) == stated
    assert out / "generation_config.json" in models.save(out, model, params)
    models.save(out, made, params)
    assert not (out / "generation_config.json").exists()
    (tmp_path / "base" / "generation_config.json").write_text("{")
    expect(message(models.TensorError, lambda: models.load(tmp_path / "base")), "generation_config.json")
    classifier = {**gpt2, "architectures": ["GPT2ForSequenceClassification"]}
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    (tmp_path / "base" / "config.json").write_text(json.dumps(classifier))
    model, params = models.load(tmp_path / "base", key=jax.random.key(0))
    models.save(tmp_path / "classifier", model, params)
    assert not (tmp_path / "classifier" / "generation_config.json").exists()


def test_export_writes_nothing_that_is_wrong(tmp_path: Path) -> None:
    model, params = network("float16")
    adapters = adapted(params)
    out = tmp_path / "out"
    beyond = {path: jax.tree.map(lambda x: x * 1e6, value) for path, value in adapters.items()}
    text = message(models.ModelError, lambda: models.export(out, model, params, beyond))
    expect(
        text, "6 merged weights exceed the range", "'params/encoder/layer_0/query/kernel' of dtype float16", "float32"
    )
    bad = {**adapters, "params/classifier/bias": jnp.full(2, jnp.nan)}
    expect(message(ValueError, lambda: models.export(out, model, params, bad)), "'params/classifier/bias'")
    text = message(models.ModelError, lambda: models.export(out, model, params, adapters, tokenizer=tmp_path))
    expect(text, "no file of a tokenizer", "vocab.txt", "save_pretrained")
    assert not out.exists()


def adapted(params: Any) -> Any:
    config = jlora.LoraConfig(rank=2, targets=("query", "value"), train_also=("classifier",))
    made = jlora.init(jax.random.key(0), params, config)
    return jax.tree.map(lambda x: x.astype(jnp.float32) + 0.5, made)
