"""Tiny encoders, and what transformers computes with them: `python tests/golden/make_encoders.py`, with torch.

Writes a folder each below `encoders/`: a checkpoint, and `expected.safetensors`; and `minilm-l6.safetensors`, a part of
what a real checkpoint computes. Write it again only when a configuration is added or changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "encoders"
SHARED = Path(__file__).parents[3] / "shared"
MINILM = SHARED / "models" / "minilm-l6"
PARTS = 12  # the number of features of each hidden state that are kept of the real checkpoint
SENTENCES = (
    "one long string of cliches .",
    "a gorgeous , witty , seductive movie .",
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
)

_BERT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {**_BERT}),
    "bert-classifier": ("BertForSequenceClassification", {**_BERT, "num_labels": 3, "type_vocab_size": 3}),
    "bert-regressor": (
        "BertForSequenceClassification",
        {**_BERT, "num_labels": 1, "hidden_act": "gelu_new", "pad_token_id": 3, "layer_norm_eps": 1e-2},
    ),
    "roberta": ("RobertaModel", {**_BERT, "type_vocab_size": 1}),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        {**_BERT, "num_labels": 3, "pad_token_id": 5, "hidden_act": "silu", "classifier_dropout": 0.3},
    ),
    "roberta-regressor": (
        "RobertaForSequenceClassification",
        {**_BERT, "num_labels": 1, "pad_token_id": 0, "hidden_act": "quick_gelu"},
    ),
    "vit": ("ViTModel", {**_IMAGES, "pooler_output_size": 6, "pooler_act": "relu", "hidden_act": "relu"}),
    "vit-classifier": ("ViTForImageClassification", {**_IMAGES, "num_labels": 3, "qkv_bias": False}),
    "vit-regressor": (
        "ViTForImageClassification",
        {**_IMAGES, "num_labels": 1, "num_channels": 1, "patch_size": 5, "hidden_act": "gelu_fast"},
    ),
}
"""The class of transformers and its configuration."""


def network(name: str, seed: int) -> Any:
    """Transformers' network, with weights large enough for every part of it to matter."""
    import torch
    import transformers

    architecture, hf = CONFIGS[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**hf)).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            centre = 1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0
            weight.copy_(centre + torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.1))
    return model


def batches(name: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Inputs as `jlora.models` takes them: tokens [batch, length], or images [batch, height, width, channels]."""
    rng, hf = np.random.default_rng(seed), CONFIGS[name][1]
    if name.startswith("vit"):
        size = hf["image_size"]
        return {"images": {"images": rng.normal(size=(2, size, size, hf.get("num_channels", 3))).astype(np.float32)}}
    padding = hf.get("pad_token_id", 1 if name.startswith("roberta") else 0)
    ids, mask = rng.integers(6, 40, (3, 9)), np.ones((3, 9), int)
    mask[1, 5:] = mask[2, :4] = 0
    padded = {"input_ids": np.where(mask, ids, padding), "attention_mask": mask}
    types = rng.integers(0, hf.get("type_vocab_size", 2), mask.shape)
    given = {"token_type_ids": types, "position_ids": rng.integers(0, 20, mask.shape)}
    return {"no mask": {"input_ids": rng.integers(6, 40, (2, 7))}, "padded": padded, "all given": {**padded, **given}}


def compute(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``logits``, or ``last`` and ``pooled``; and ``hidden`` [layers, batch, length, width], each layer's states."""
    import torch

    given = {name: torch.tensor(value) for name, value in batch.items()}
    if "images" in given:
        given = {"pixel_values": given["images"].permute(0, 3, 1, 2).contiguous()}
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    found = {"hidden": torch.stack(out.hidden_states[1:])}
    if "logits" in out:
        found["logits"] = out.logits
    else:
        found |= {"last": out.last_hidden_state, "pooled": out.pooler_output}
    return {name: value.numpy() for name, value in found.items()}


def tokenized(sentences: list[str]) -> dict[str, np.ndarray]:
    """The real checkpoint's tokens, padded to the longest sentence."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(MINILM)(sentences, padding=True, return_tensors="np")
    return {name: np.asarray(tokens[name]) for name in ("input_ids", "attention_mask")}


def main() -> None:
    from transformers import BertModel

    for seed, name in enumerate(CONFIGS):
        shutil.rmtree(HERE / name, ignore_errors=True)
        model = network(name, seed)
        model.save_pretrained(HERE / name)
        expected: dict[str, np.ndarray] = {}
        for sort, batch in batches(name, seed).items():
            expected |= {f"{sort}/in/{key}": value for key, value in batch.items()}
            expected |= {f"{sort}/out/{key}": value for key, value in compute(model, batch).items()}
        save_file(expected, HERE / name / "expected.safetensors")
    batch = tokenized(list(SENTENCES))
    found = compute(BertModel.from_pretrained(MINILM).eval(), batch)
    kept = {"hidden": np.ascontiguousarray(found["hidden"][..., :PARTS]), "pooled": found["pooled"]}
    save_file({**batch, **kept}, HERE / "minilm-l6.safetensors")


if __name__ == "__main__":
    main()
