"""More networks against the real peft: names of modules, and heads with factors."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models, peft
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.messages import expect, message
from tests.peft_cases import PRE, assert_close, base, edited, needs_peft
from tests.small_checkpoints import VIT, change

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Warnings of torch, transformers and peft are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drawn(model: Any, params: Any, config: jlora.LoraConfig, batch: Any) -> dict[str, Any]:
    """Adapters as if trained: every array is random."""
    uses = jlora.trace(model.apply, params, batch)
    leaves, treedef = jax.tree.flatten(jlora.init(jax.random.key(0), params, config, uses))
    rng = np.random.default_rng(0)
    return treedef.unflatten([x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


def test_names_of_the_model_and_of_its_files() -> None:
    """One table has both, and they differ only for ViT."""
    vit = models.tensor_names(models.build(VIT))
    kernels = [path for path in vit if path.endswith("layer_0/" + path.split("/")[-2] + "/kernel")]
    assert {vit[path].tensors[0] for path in kernels} == {
        f"layers.0.{part}.weight" for part in (*(f"attention.{p}_proj" for p in "qkvo"), "mlp.fc1", "mlp.fc2")
    }
    assert {vit[path].files[0] for path in kernels} == {
        f"encoder.layer.0.{part}.weight"
        for part in (
            *(f"attention.attention.{p}" for p in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    }
    norm = vit["params/layer_0/attention_norm/scale"]
    assert (norm.tensors, norm.files) == (
        ("layers.0.layernorm_before.weight",),
        ("encoder.layer.0.layernorm_before.weight",),
    )
    gpt2 = models.tensor_names(models.build({"model_type": "gpt2", **SMALL}))
    assert all(name.files == name.tensors for name in gpt2.values())


@pytest.mark.slow
@needs_peft
def test_vit_in_both_directions(tmp_path: Path) -> None:
    import peft as theirs
    import torch
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the modules of ViT have these names since transformers 5")
    torch.manual_seed(0)
    hf: dict[str, Any] = {name: value for name, value in VIT.items() if name != "model_type"}
    transformers.ViTForImageClassification(transformers.ViTConfig(**hf, initializer_range=0.3)).save_pretrained(
        tmp_path / "base"
    )
    model, params = models.load(tmp_path / "base")
    names: Any = models.tensor_names(model)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)

    def fresh() -> Any:
        return transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")

    def logits(network: Any) -> Any:
        with torch.no_grad():
            return network.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).logits

    def check(adapters: Any, expected: Any) -> None:
        assert np.abs(np.asarray(expected) - np.asarray(logits(fresh()))).max() > 0.01
        assert_close(jax.jit(model.apply)(jlora.merge(params, adapters), images), expected)

    config = jlora.LoraConfig(2, targets=("query", "attention_output", "intermediate", "output"))
    adapters = drawn(model, params, config, images)
    peft.save(tmp_path / "ours", names, params, adapters, config)
    check(adapters, logits(theirs.PeftModel.from_pretrained(fresh(), str(tmp_path / "ours"))))

    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    adapted = theirs.get_peft_model(
        fresh(),
        theirs.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["classifier"]),
    )
    adapted.save_pretrained(str(tmp_path / "theirs"))
    check(peft.load(tmp_path / "theirs", names, params)[0], logits(adapted))

    # In transformers 4 modules had the names of the files, and so do its adapters.
    change(tmp_path / "theirs", in_transformers_4, ADAPTER_WEIGHTS)
    file = tmp_path / "theirs" / ADAPTER_CONFIG
    old = {"target_modules": ["query", "value", "intermediate.dense", "output.dense"]}
    old |= {"exclude_modules": ["attention.output.dense"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    check(peft.load(tmp_path / "theirs", names, params)[0], logits(adapted))


def in_transformers_4(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pairs = {"vit.layers.": "vit.encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    pairs |= {"attention.q_proj": "attention.attention.query", "attention.v_proj": "attention.attention.value"}
    return {functools.reduce(lambda n, p: n.replace(*p), pairs.items(), name): x for name, x in tensors.items()}


@needs_peft
def test_layers_trained_whole_and_by_factors(tmp_path: Path) -> None:
    """In a stacked leaf this is refused, and the advice to merge in PEFT works; an encoder loads both."""
    import peft as theirs
    import torch
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    sizes |= {"intermediate_size": 24, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
    ids = np.random.default_rng(0).integers(1, 32, (2, 6))
    pairs: Any = (
        (transformers.LlamaForCausalLM, transformers.LlamaConfig, "q_proj", "layers.1.self_attn"),
        (transformers.BertForSequenceClassification, transformers.BertConfig, "query", "layer.1.attention.self"),
    )
    for network, config, query, whole in pairs:
        torch.manual_seed(0)
        base_ = network(config(**sizes))
        base_.save_pretrained(tmp_path / query)
        model, params = models.load(tmp_path / query)
        adapted: Any = theirs.get_peft_model(
            base_, theirs.LoraConfig(r=2, target_modules=[query], modules_to_save=[whole])
        ).eval()
        for value in adapted.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value, std=0.3)
        folder = tmp_path / f"{query}-adapter"
        adapted.save_pretrained(str(folder))
        with torch.no_grad():
            expected = adapted(torch.tensor(ids)).logits
        if query == "query":
            again: Any = peft.load(folder, models.tensor_names(model), params)[0]
            params = jlora.merge(params, again)
        else:
            text = message(peft.PeftError, lambda f=folder, m=model, p=params: peft.load(f, models.tensor_names(m), p))
            expect(text, "'params/model/layers/self_attn/q_proj/kernel'", "layers.1.self_attn.q_proj.weight")
            assert "k_proj" not in text
            adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
            model, params = models.load(tmp_path / "merged")
        assert_close(jax.jit(model.apply)(params, ids), expected)


@pytest.mark.sampled(1)
@needs_peft
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_head_with_factors_is_written_whole(use_dora: bool, tmp_path: Path) -> None:
    """PEFT trains the head of SEQ_CLS whole; the update is in the weight, and the logits are ours."""
    import peft as theirs
    import torch
    import transformers

    torch.manual_seed(0)
    network = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**SMALL, initializer_range=0.3))
    network.save_pretrained(tmp_path / "base")
    model, params = models.load(tmp_path / "base")
    ids = np.random.default_rng(0).integers(1, 32, (2, 6))
    config = jlora.LoraConfig(2, alpha=3, targets=("c_attn", "score"), exclude=(), use_dora=use_dora)
    adapters = drawn(model, params, config, ids)
    assert "params/score/kernel" in adapters
    expected = jax.jit(model.apply)(jlora.merge(params, adapters), ids)
    peft.save(tmp_path / "ours", models.tensor_names(model), params, adapters, config, task_type="SEQ_CLS")
    found = theirs.PeftModel.from_pretrained(network, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert_close(found(torch.tensor(ids)).logits, expected)
    again: Any = peft.load(tmp_path / "ours", models.tensor_names(model), params)[0]
    assert again["params/score/kernel"].shape == (16, 2)
    assert_close(jax.jit(model.apply)(jlora.merge(params, again), ids), expected)


def test_a_task_without_such_a_head_owes_none(tmp_path: Path) -> None:
    """SEQ_CLS asks for a classifier only where the model has one: the bare network reads the same adapter."""
    b = base("toy")

    def classify(config: dict, tensors: dict) -> None:
        config["task_type"] = "SEQ_CLS"

    folder = edited(tmp_path / "it", "toy", classify)
    assert not any(name.startswith(PRE + "classifier") for name in b.names)
    assert set(peft.load(folder, b.names, b.params)[0]) == set(
        peft.load(edited(tmp_path / "same", "toy", lambda c, t: None), b.names, b.params)[0]
    )
