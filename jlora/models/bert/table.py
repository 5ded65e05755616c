"""The tensor names of BERT and RoBERTa, and the reader of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jlora._src.tree.sharding import ShardingRules
from jlora.files.errors import ModelError
from jlora.files.tensor_names import TensorName, embedding, linear, norm
from jlora.models._encoder import layer_names
from jlora.models._family import Family, TaskName, read_config
from jlora.models.bert.modeling import Bert, BertConfig, BertForSequenceClassification

_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}

SHARDING_RULES: ShardingRules = (
    # Their vocabularies (30522 and 50265) have few divisors.
    (r"_embeddings/embedding$", P(None, "fsdp")),
    (r"/(query|key|value|intermediate|pooler|dense)/kernel$", P("fsdp", "tensor")),
    (r"/(query|key|value|intermediate|pooler|dense)/bias$", P("tensor")),
    (r"/(attention_output|output)/kernel$", P("tensor", "fsdp")),
    (r"/(classifier|out_proj)/kernel$", P("fsdp")),
    (r"/(attention_output|output|classifier|out_proj)/bias$", P()),
    (r"_norm/", P()),
)


def tensor_names(config: BertConfig, task: TaskName) -> dict[str, TensorName]:
    """The tensor names of every leaf of the network for ``task``, in transformers' class for it."""
    kind = "roberta" if config.roberta else "bert"
    bare = task == "features"
    path, module = ("params", "") if bare else ("params/encoder", f"{kind}.")
    found: dict[str, TensorName] = {}
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        found |= embedding(f"{path}/{table}", f"{module}embeddings.{table}")
    found |= norm(f"{path}/embeddings_norm", f"{module}embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        found |= layer_names(f"{path}/layer_{i}", f"{module}encoder.layer.{i}", _LINEARS, _NORMS)
    if bare or not config.roberta:
        found |= linear(f"{path}/pooler", f"{module}pooler.dense")
    if not bare and config.roberta:
        found |= linear("params/classifier/dense", "classifier.dense")
        found |= linear("params/classifier/out_proj", "classifier.out_proj")
    elif not bare:
        found |= linear("params/classifier", "classifier")
    return found


def _read(hf: Mapping[str, Any]) -> BertConfig:
    roberta = hf["model_type"] == "roberta"
    defaults = {n: v for n, v in (("pad_token_id", 1), ("vocab_size", 50265)) if roberta and n not in hf}
    config = read_config(
        BertConfig,
        hf,
        ignored=frozenset(
            """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
            tie_word_embeddings""".split()
        ),
        fixed={"pooler_type": ("first_token_transform",), "position_embedding_type": ("absolute",)},
        divides=[("num_attention_heads", "hidden_size")],
        derive=lambda hf: {"roberta": roberta, **defaults},
    )
    if roberta and (config.pad_token_id is None or config.pad_token_id < 0 or (config.max_length or 0) < 1):
        raise ModelError(
            f"pad_token_id = {config.pad_token_id}: RoBERTa counts its {config.max_position_embeddings} positions "
            "(max_position_embeddings) from it; expected a number that leaves some free, usually 1"
        )
    return config


def _family(kind: str, architecture: str) -> Family:
    return Family(
        config=_read,
        networks={"features": Bert, "sequence-classification": BertForSequenceClassification},
        tensor_names=tensor_names,
        sharding_rules=SHARDING_RULES,
        prefix=f"{kind}.",
        architecture=architecture,
        heads=r"^params/(classifier/|(encoder/)?pooler/)",
        unread=r"^(cls\.|lm_head\.|qa_outputs\.|classifier\.)|(^|\.)embeddings\.(position|token_type)_ids$|^(roberta\.|bert\.)?pooler\.",
    )


BERT = _family("bert", "Bert")
ROBERTA = _family("roberta", "Roberta")
