"""Invalid configurations, damaged files and wrong indices are refused, and the error names them."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jlora import models
from jlora.files.safetensors import is_finite
from tests.messages import expect, message
from tests.small_checkpoints import BERT, VIT, change, network, same

# ---- configurations that are refused


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"hiden_size": 3, "rotary": True},
            ("2 attribute", "hiden_size = 3 is unknown (closest: 'hidden_size'", "rotary"),
        ),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type = 'relative_key'", "'absolute'")),
        (
            {"is_decoder": True, "add_cross_attention": True},
            ("2 attribute", "is_decoder = True", "add_cross_attention"),
        ),
        ({"model_type": "brt"}, ("'brt' is not a network", "closest: 'bert'", "expected one of")),
        ({"model_type": ["bert"]}, ("is not a network", "expected one of")),
        ({"model_type": None}, ("None", "expected one of")),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantized ('gptq')", "original checkpoint")),
        ({"quantization_config": "int8"}, ("quantized ('int8')",)),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ("'bitsandbytes', 'fp4'",)),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, ("'pack-quan",)),
        ({"roberta": True}, ("roberta = True is unknown",)),
        ({"hidden_act_param": 1, "pooler_type": "max"}, ("2 attribute", "'first_token_transform'", "hidden_act_param")),
        ({"num_attention_heads": 3, "hidden_act": "swiglu"}, ("2 attribute", "divisor of hidden_size = 16", "swiglu")),
        ({"num_attention_heads": 0}, ("1 attribute", "num_attention_heads = 0; expected an integer from 1")),
        (
            {"num_attention_heads": "x", "hidden_size": None, "hidden_act": ["gelu"]},
            ("3 attribute", "num_attention_heads = 'x'; expected an integer", "hidden_size = None", "hidden_act"),
        ),
        ({"architectures": 1e308}, ("config.json", "architectures = 1e+308; expected a list, each a string or null")),
        ({"vocab_size": 2**40}, ("vocab_size = 1099511627776; expected an integer from 1 to 2147483647",)),
        ({"hidden_size": 0}, ("1 attribute", "hidden_size = 0; expected an integer from 1")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers = 1000000000; expected an integer from 1 to 1000",)),
        ({"layer_norm_eps": float("nan")}, ("layer_norm_eps = nan; expected a number from 0 to 1",)),
        ({"hidden_dropout_prob": True}, ("hidden_dropout_prob = True; expected a number from 0 to 1",)),
        ({"classifier_dropout": "x"}, ("classifier_dropout = 'x'; expected a number from 0 to 1 or null",)),
        ({"id2label": 7, "num_labels": "x"}, ("2 attribute", "id2label = 7; expected an object", "num_labels = 'x'")),
        ({"is_decoder": 0}, ("is_decoder = 0; this network supports False",)),
        ({"model_type": "roberta", "pad_token_id": 7}, ("pad_token_id = 7: RoBERTa counts its 8 positions",)),
        ({"model_type": "roberta", "pad_token_id": None}, ("pad_token_id = None: RoBERTa",)),
        ({"hidden_act": "swiglu"}, ("hidden_act = 'swiglu'; expected one of gelu, gelu_new",)),
    ],
)
def test_a_configuration_that_the_network_is_not_is_refused_by_name(
    change: dict[str, Any], parts: tuple[str, ...], saved: Path
) -> None:
    (saved / "config.json").write_text(json.dumps({**BERT, **change}))
    expect(message(models.ModelError, lambda: models.load(saved)), *parts)


def test_attributes_without_effect_are_passed_over(saved: Path) -> None:
    """As published files have them; a byte order mark too."""
    inert = {
        "_attn_implementation_autoset": True,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "sentence_transformers": {},
        "transformers.js_config": {},
    }
    (saved / "config.json").write_text(json.dumps({**BERT, **inert}), encoding="utf-8-sig")
    assert same(models.load(saved)[1], network()[1])


def test_a_quantization_that_is_none_is_none(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({**BERT, "quantization_config": None}))
    assert same(models.load(saved)[1], network()[1])


def test_a_task_that_the_family_lacks_is_refused(saved: Path) -> None:
    text = message(models.ModelError, lambda: models.load(saved, task="causal-lm"))
    expect(text, "bert has no network for the task 'causal-lm'", "features, sequence-classification", "pass task=")
    text = message(models.ModelError, lambda: models.build({**VIT, "architectures": ["ViTForCausalLM"]}))
    expect(text, "vit has no network for the task 'causal-lm'", "features, image-classification")


def test_a_network_of_nobodys_has_no_names() -> None:
    import flax.linen as nn

    expect(
        message(models.ModelError, lambda: models.tensor_names(nn.Dense(3))), "Dense is not a network of jlora.models"
    )


# ---- files that are refused


def test_every_tensor_that_does_not_fit_is_listed(saved: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["bert.pooler.dense.bias"], tensors["bert.encoder.layer.1.output.dense.weight"]
        tensors["bert.embeddings.LayerNorm.weight"] = np.ones(3, np.float32)
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.ones(16, np.float32)
        return tensors

    change(saved, damage)
    text = message(models.ModelError, lambda: models.load(saved))
    expect(text, "4 tensor(s)", "'bert.pooler.dense.bias' of shape (16,) is missing; pass key=", "(16, 32) is missing")
    expect(text, "'bert.embeddings.LayerNorm.weight' has shape (3,), expected (16,)", "'bert.encoder.layer.2.output")
    text = message(models.ModelError, lambda: models.load(saved, key=jax.random.key(0)))
    expect(text, "3 tensor(s)")


def test_one_leaf_under_two_names_is_named(saved: Path) -> None:
    norm = "bert.embeddings.LayerNorm."

    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["pooler.dense.bias"] = tensors["bert.pooler.dense.bias"]
        tensors[norm + "gamma"] = tensors[norm + "weight"]

    change(saved, damage)
    text = message(models.ModelError, lambda: models.load(saved))
    expect(text, "2 tensor(s)", "'pooler.dense.bias'", "'bert.pooler.dense.bias'", "are one tensor of the network")
    expect(text, f"'{norm}gamma'", f"'{norm}weight'")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_with_nan_is_named(dtype: Any, value: float, saved: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        array = tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"].astype(dtype)
        array[3, 5] = value

    change(saved, damage)
    text = message(models.TensorError, lambda: models.load(saved))
    expect(text, "model.safetensors: the tensor 'bert.pooler.dense.weight' holds NaN or infinity", "damaged")


def test_finite_is_told_exactly_and_fast() -> None:
    """The largest, smallest and negative numbers are finite; checking 16-bit floats is as fast as reading them."""
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
        info = ml_dtypes.finfo(dtype)
        array = np.array([0, -0.0, info.max, info.min, info.tiny, -info.smallest_subnormal], dtype)
        assert is_finite(array) and is_finite(array[::2]) and is_finite(array[:0]) and is_finite(array[0])
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            assert not is_finite(np.append(array, np.array(bad, dtype)))
            assert not is_finite(np.array(bad, dtype))
    large = np.ones((2000, 2000), ml_dtypes.bfloat16)
    start = time.perf_counter()
    assert is_finite(large.T)
    assert time.perf_counter() - start < 0.5


def test_a_missing_or_broken_config_is_named(saved: Path) -> None:
    for content, part in (
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 10**5, "JSON"),
    ):
        (saved / "config.json").write_text(content)
        expect(message(models.TensorError, lambda: models.load(saved)), str(saved / "config.json"), part)
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    expect(message(models.TensorError, lambda: models.load(saved)), "cannot be read as JSON")
    (saved / "config.json").unlink()
    expect(message(models.TensorError, lambda: models.load(saved)), str(saved / "config.json"), "No such file")


def test_pickled_weights_are_refused_with_the_way_out(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    text = message(models.TensorError, lambda: models.load(saved))
    expect(text, "pytorch_model.bin", "pickled", "could run any code", "save_pretrained")
    (saved / "pytorch_model.bin").unlink()
    expect(message(models.TensorError, lambda: models.load(saved)), "neither model.safetensors nor", "['config.json']")


@pytest.mark.parametrize(
    ("weight_map", "parts"),
    [
        ({"x": "../model.safetensors"}, ("outside of its folder", "../model.safetensors", "do not use")),
        ({"x": "/etc/passwd"}, ("outside of its folder", "/etc/passwd")),
        ({"x": "..\\model.safetensors"}, ("outside of its folder",)),
        ({"x": ""}, ("outside of its folder",)),
        ({"x": ".."}, ("outside of its folder",)),
        ({"x": "a\0b"}, ("names files that do not exist",)),
        ({"x": "gone.safetensors"}, ("names files that do not exist: ['gone.safetensors']", "Fetch")),
        ({"x": "one.safetensors"}, ("disagree", "'x' is not in one.safetensors")),
        ([["x", "one.safetensors"]], ("expected a `weight_map`",)),
        ({"x": 3}, ("expected a `weight_map`",)),
        (None, ("expected a `weight_map`", "None")),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, parts: tuple[str, ...], saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "one.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = message(models.TensorError, lambda: models.load(saved))
    expect(text, "model.safetensors.index.json", *parts)


def header(tensors: Any, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"garbage, and no tensors at all",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 15),
        header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, b"\0" * 16),
        header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]}}, b"\0" * 16),
        header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, b"\0" * 16),
        header({"x": {"dtype": "F77", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        header(["x"]),
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(content)
    text = message(models.TensorError, lambda: models.load(saved))
    expect(text, str(saved / "model.safetensors"), "not a complete safetensors file", "Fetch or export")


def test_a_truncated_checkpoint_is_refused(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        (saved / "model.safetensors").write_bytes(content[:size])
        expect(message(models.TensorError, lambda: models.load(saved)), "not a complete safetensors file")


def test_quantized_tensors_are_refused_by_name(saved: Path) -> None:
    content = header({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4)
    (saved / "model.safetensors").write_bytes(content)
    expect(message(models.TensorError, lambda: models.load(saved)), "w: F8_E4M3", "uantized checkpoints")


def test_the_nearest_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "minilm-l6").mkdir()
    text = message(models.ModelError, lambda: models.load(tmp_path / "minilm"))
    expect(text, f"there is no folder '{tmp_path}/minilm' (closest: '{tmp_path}/minilm-l6')")


@pytest.mark.parametrize("path", ["nobody/no-such-model", "no-such-model", "./no/such/folder", "/no/such/folder"])
def test_what_is_no_folder_and_not_on_the_hub_is_told_quickly(path: str) -> None:
    start = time.perf_counter()
    text = message(models.ModelError, lambda: models.load(path))
    if path.startswith((".", "/")):
        expect(text, f"there is no folder '{path}'", "config.json and model.safetensors")
        assert "hub" not in text
    else:
        expect(text, f"'{path}' is not a folder", "config.json and model.safetensors", "without a network")
    assert time.perf_counter() - start < 20
