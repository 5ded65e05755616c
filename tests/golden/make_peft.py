"""Adapters that the real peft wrote, and what torch computes with them; run by hand where torch is installed:

    HF_HUB_OFFLINE=1 python tests/golden/make_peft.py

`tests/peft/test_peft.py` reads them on machines without torch, and writes them anew where there is torch.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "peft"
BASES = ("roberta", "gpt2", "llama", "toy")


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter: its base, and the arguments of ``peft.LoraConfig``."""

    base: str
    config: dict[str, Any]
    save: dict[str, Any] = dataclasses.field(default_factory=dict)


ALL_OF_TOY = ["tokens", "conv", "up", "dense", "head"]
CASES = {
    "plain": Case("roberta", {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "lora_dropout": 0.1}),
    "patterns": Case(
        "roberta",
        {
            "r": 4,
            "lora_alpha": 7,
            "target_modules": r".*attention\.self\.(query|key|value)",
            "exclude_modules": r".*layer\.1.*key",
            "rank_pattern": {"query": 2, r"layer\.1\.attention\.self\.value": 3},
            "alpha_pattern": {"^roberta.encoder.layer.0.attention.self.value": 5},
            "use_rslora": True,
        },
    ),
    "classifier": Case(
        "roberta", {"r": 2, "target_modules": ["query", "intermediate.dense"], "bias": "all", "task_type": "SEQ_CLS"}
    ),
    "dora": Case(
        "roberta",
        {
            "r": 2,
            "target_modules": ["query", "word_embeddings", "intermediate.dense"],
            "use_dora": True,
            "bias": "lora_only",
            "modules_to_save": ["LayerNorm"],
        },
    ),
    "gpt2": Case("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-dora": Case(
        "gpt2",
        {
            "r": 3,
            "target_modules": ["c_attn", "mlp.c_fc"],
            "use_dora": True,
            "use_rslora": True,
            "modules_to_save": ["ln_1", "ln_f"],
            "bias": "lora_only",
            "task_type": "CAUSAL_LM",
        },
    ),
    "llama": Case(
        "llama",
        {
            "r": 4,
            "lora_alpha": 5,
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
        },
    ),
    "llama-layers": Case(
        "llama",
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_dora": True},
    ),
    "llama-embeddings": Case("llama", {"r": 2, "target_modules": ["v_proj"]}, {"save_embedding_layers": True}),
    "toy": Case("toy", {"r": 3, "lora_alpha": 7, "target_modules": ALL_OF_TOY}),
    "toy-dora": Case("toy", {"r": 3, "target_modules": ALL_OF_TOY, "use_dora": True, "use_rslora": True}),
    "toy-whole": Case(
        "toy", {"r": 2, "target_modules": ["dense", "up"], "modules_to_save": ["head", "blocks.1.norm", "tokens"]}
    ),
}


def inputs(base: str) -> dict[str, np.ndarray]:
    """A batch for a base, by the names of its arguments."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 32, (3, 6)).astype(np.int32)
    if base == "toy":
        return {"ids": ids % 11, "images": rng.normal(size=(3, 4, 6, 6)).astype(np.float32)}
    mask = np.ones_like(ids)
    if base == "roberta":
        mask[1, 4:] = 0
        ids[1, 4:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def torch_base(base: str) -> Any:
    """The PyTorch model, always with the same weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 32, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **small}
    if base == "roberta":
        config = hf.RobertaConfig(**common, max_position_embeddings=20, pad_token_id=1)
        config.num_labels = 3
        model = hf.RobertaForSequenceClassification(config)
    elif base == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**small, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    elif base == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**common, num_key_value_heads=1, max_position_embeddings=16))
    else:
        model = _toy()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def _toy() -> Any:
    """A module of each kind that peft adapts, and two blocks that our side stacks."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.dense(self.norm(x)).tanh()

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.conv = nn.Embedding(11, 6), nn.Conv2d(4, 5, (3, 2))
            self.up, self.blocks = Conv1D(8, 11), nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            words, pictures = self.tokens(ids).mean(1), self.conv(images).relu().mean((2, 3))
            x = self.up(torch.cat([words, pictures], 1)).tanh()
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Toy()


def torch_logits(model: Any, base: str) -> np.ndarray:
    """What a PyTorch model of that base computes for `inputs`."""
    import torch

    with torch.no_grad():
        found = model(**{name: torch.tensor(value) for name, value in inputs(base).items()})
    return getattr(found, "logits", found).numpy()


def write_case(folder: Path, case: Case) -> np.ndarray:
    """Let peft write an adapter with random weights; returns the logits that it gives."""
    import peft
    import torch

    model = peft.get_peft_model(torch_base(case.base), peft.LoraConfig(**case.config)).eval()
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        if "magnitude" in name or name.endswith(("norm.weight", "Norm.weight")):
            torch.nn.init.uniform_(value, 0.5, 1.5)
        else:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(str(folder), **case.save)
    (folder / "README.md").unlink(missing_ok=True)
    return torch_logits(model, case.base)


def main(folder: Path = FOLDER) -> None:
    """Write bases, adapters and expected logits."""
    shutil.rmtree(folder, ignore_errors=True)
    expected = {}
    for base in BASES:
        model = torch_base(base)
        expected[f"base-{base}"] = torch_logits(model, base)
        if base == "toy":
            (folder / "base-toy").mkdir(parents=True)
            save_file({k: v.numpy() for k, v in model.state_dict().items()}, folder / "base-toy" / "model.safetensors")
        else:
            model.save_pretrained(str(folder / f"base-{base}"))
            (folder / f"base-{base}" / "generation_config.json").unlink(missing_ok=True)
    for name, case in CASES.items():
        expected[name] = write_case(folder / name, case)
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*map(Path, sys.argv[1:]))
