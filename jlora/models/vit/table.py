"""The tensor names of the Vision Transformer, and the reader of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jlora._src.tree.sharding import ShardingRules
from jlora.files.errors import ModelError
from jlora.files.tensor_names import TensorName, array, conv2d, linear, norm, stored_as
from jlora.models._encoder import layer_names
from jlora.models._family import Family, TaskName, read_config
from jlora.models.vit.modeling import ViT, ViTConfig, ViTForImageClassification

_LINEARS = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "attention_output": "attention.o_proj",
    "intermediate": "mlp.fc1",
    "output": "mlp.fc2",
}
_NORMS = {"attention_norm": "layernorm_before", "output_norm": "layernorm_after"}

_STORED = (
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
"""Parts of names in transformers 5, and their spelling in checkpoints."""

SHARDING_RULES: ShardingRules = (
    (r"/patch_embeddings/kernel$", P(None, None, None, "fsdp")),
    (r"/(query|key|value|intermediate|pooler)/kernel$", P("fsdp", "tensor")),
    (r"/(query|key|value|intermediate|pooler)/bias$", P("tensor")),
    (r"/(attention_output|output)/kernel$", P("tensor", "fsdp")),
    (r"/classifier/kernel$", P("fsdp")),
    (r"/(patch_embeddings|attention_output|output|classifier)/bias$", P()),
    (r"/(cls_token|position_embeddings)$|_norm/", P()),
)


def tensor_names(config: ViTConfig, task: TaskName) -> dict[str, TensorName]:
    """The tensor names of every leaf of the network for ``task``, in transformers' class for it."""
    bare = task == "features"
    path, module = ("params", "") if bare else ("params/encoder", "vit.")
    found = conv2d(f"{path}/patch_embeddings", f"{module}embeddings.patch_embeddings.projection")
    for leaf in ("cls_token", "position_embeddings"):
        found |= array(f"{path}/{leaf}", f"{module}embeddings.{leaf}")
    without_bias = () if config.qkv_bias else ("query", "key", "value")
    for i in range(config.num_hidden_layers):
        found |= layer_names(f"{path}/layer_{i}", f"{module}layers.{i}", _LINEARS, _NORMS, without_bias)
    found |= norm(f"{path}/final_norm", f"{module}layernorm")
    found |= linear(f"{path}/pooler", "pooler.dense") if bare else linear("params/classifier", "classifier")
    return stored_as(found, *_STORED)


def _read(hf: Mapping[str, Any]) -> ViTConfig:
    for name in ("image_size", "patch_size"):
        if isinstance(hf.get(name), list):
            raise ModelError(f"{name} = {hf[name]}; expected one number of pixels: images and patches are square")
    config = read_config(
        ViTConfig,
        hf,
        ignored=frozenset({"encoder_stride", "tie_word_embeddings"}),
        divides=[("num_attention_heads", "hidden_size")],
    )
    if config.image_size < config.patch_size:
        raise ModelError(f"patch_size = {config.patch_size}; expected at most image_size = {config.image_size}")
    return config


VIT = Family(
    config=_read,
    networks={"features": ViT, "image-classification": ViTForImageClassification},
    tensor_names=tensor_names,
    sharding_rules=SHARDING_RULES,
    prefix="vit.",
    architecture="ViT",
    heads=r"^params/(classifier|pooler)/",
    unread=r"^(classifier|decoder)\.|^(vit\.)?(pooler\.|embeddings\.mask_token$)",
)
