"""Tiny decoders, and what transformers computes with them: `python tests/golden/make_decoders.py`, with torch.

Writes a folder each below `decoders/`: a checkpoint, and `expected.safetensors`. The bits depend on the machine:
write them again only when a configuration is added or changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "decoders"
NEW = 6
LENGTH, REAL = 12, (12, 7, 9)  # tokens in each row: all, then padding on the right, then on the left

_LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4, "beta_slow": 1}
_GPT2: dict[str, Any] = {
    "vocab_size": 48,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "pad_token_id": 0,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", **_LLAMA},
    "llama3": {
        "model_type": "llama",
        **_LLAMA,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, **_LLAMA3},
    },
    "llama-linear": {
        "model_type": "llama",
        **_LLAMA,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-dynamic": {
        "model_type": "llama",
        **_LLAMA,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 4, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen2-sliding": {
        "model_type": "qwen2",
        **_LLAMA,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        **_LLAMA,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **_YARN},
    },
    "gemma": {"model_type": "gemma", **_LLAMA, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        **_LLAMA,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {"model_type": "gpt2", **_GPT2, **_ENDS},
    "gpt2-scaled": {
        "model_type": "gpt2",
        **_GPT2,
        **_ENDS,
        "n_inner": 24,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
}


def network(name: str, seed: int, kind: str = "CausalLM") -> Any:
    """Transformers' network, with weights large enough for every part of it to matter."""
    import torch
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    hf = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            centre = weight.mean() if "norm" in path or "ln_" in path else 0.0
            weight.copy_(centre + torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.1))
    return model


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [3, LENGTH]: a full row, one padded on the right, and one on the left."""
    ids = np.random.default_rng(seed).integers(3, 48, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, REAL[1] :] = 0
    mask[2, : LENGTH - REAL[2]] = 0
    return ids * mask, mask


def states(model: Any, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [3, LENGTH, vocab], and the states after each layer [layers, 3, LENGTH, width], the last normalized."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True, use_cache=False)
    return out.logits.numpy(), torch.stack(out.hidden_states[1:]).numpy()


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The NEW most probable tokens after the rows that are not padded on the right, [2, NEW]; none ends."""
    import torch

    rows = [0, 2]
    ids_, mask_ = torch.tensor(ids[rows]), torch.tensor(mask[rows])
    model.generation_config.eos_token_id = None
    out = model.generate(ids_, attention_mask=mask_, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    return out[:, ids.shape[1] :].numpy()


def main() -> None:
    for seed, name in enumerate(CONFIGS):
        shutil.rmtree(HERE / name, ignore_errors=True)
        model = network(name, seed)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink()
        ids, mask = batch(seed)
        logits, hidden = states(model, ids, mask)
        expected = {"logits": logits, "hidden": hidden, "greedy": greedy(model, ids, mask)}
        tensors = {"input_ids": ids, "attention_mask": mask, **expected}
        # safetensors writes the memory of a view, not its logical order.
        contiguous = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
        save_file(contiguous, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    main()
