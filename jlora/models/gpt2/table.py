"""The tensor names of GPT-2, and the reader of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jlora._src.tree.sharding import ShardingRules
from jlora.files.tensor_names import TensorName, conv1d, embedding, norm
from jlora.models._family import Family, TaskName, read_config
from jlora.models._heads import head_names, tied_head
from jlora.models.gpt2.modeling import GPT2, GPT2Config, GPT2ForCausalLM, GPT2ForSequenceClassification

SHARDING_RULES: ShardingRules = (
    # The vocabulary (50257) has few divisors.
    (r"/(wte|wpe)/embedding$", P(None, "fsdp")),
    (r"/(c_attn|c_fc)/kernel$", P(None, "fsdp", "tensor")),
    (r"/(c_attn|c_fc)/bias$", P(None, "tensor")),
    (r"/c_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"/(lm_head|score)/kernel$", P("fsdp")),
    (r"/c_proj/bias$|/ln_", P()),
)


def tensor_names(config: GPT2Config, task: TaskName) -> dict[str, TensorName]:
    """The tensor names of every leaf of the network for ``task``, in transformers' class for it."""
    bare, layers = task == "features", config.n_layer
    path, module = ("params", "") if bare else ("params/transformer", "transformer.")
    found = embedding(f"{path}/wte", f"{module}wte", tied=tied_head(config, task))
    found |= embedding(f"{path}/wpe", f"{module}wpe")
    for part in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
        found |= conv1d(f"{path}/h/{part}", f"{module}h.{{}}.{part.replace('/', '.')}", layers=layers)
    for part in ("ln_1", "ln_2"):
        found |= norm(f"{path}/h/{part}", f"{module}h.{{}}.{part}", layers=layers)
    found |= norm(f"{path}/ln_f", f"{module}ln_f")
    return found | head_names(config, task)


def _read(hf: Mapping[str, Any]) -> GPT2Config:
    return read_config(
        GPT2Config,
        hf,
        ignored=frozenset(
            """n_ctx n_special predict_special_tokens reorder_and_upcast_attn summary_activation
            summary_first_dropout summary_proj_to_labels summary_type summary_use_proj""".split()
        ),
        divides=[("n_head", "n_embd")],
    )


GPT2_FAMILY = Family(
    config=_read,
    networks={
        "features": GPT2,
        "causal-lm": GPT2ForCausalLM,
        "sequence-classification": GPT2ForSequenceClassification,
    },
    tensor_names=tensor_names,
    sharding_rules=SHARDING_RULES,
    prefix="transformer.",
    architecture="GPT2",
    heads=r"^params/(lm_head|score)/",
    # Old checkpoints contain the causal mask as a buffer, and a tied model's head.
    unread=r"^(lm_head|score|multiple_choice_head)\.|(^|\.)attn\.(bias|masked_bias)$",
)
