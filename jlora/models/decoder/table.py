"""The tensor names of Llama, Mistral, Qwen and Gemma, and the readers of their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jax.sharding import PartitionSpec as P

from jlora._src.tree.sharding import ShardingRules
from jlora.fields import Within
from jlora.files.errors import ModelError
from jlora.files.tensor_names import TensorName, embedding, linear, norm
from jlora.models._family import Family, PositiveOrNull, SizeOrNull, TaskName, read_config
from jlora.models._heads import head_names, tied_head
from jlora.models._layers import Activation
from jlora.models.decoder.modeling import (
    Decoder,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
)
from jlora.models.decoder.rope import read_rope

# Types of non-field attributes, from which fields are derived.
_COMMON: dict[str, Any] = {
    "rope_theta": PositiveOrNull,
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
    "max_position_embeddings": SizeOrNull,
}
_BIAS: dict[str, Any] = {"attention_bias": bool}
_WINDOW: dict[str, Any] = {"sliding_window": SizeOrNull}
_SLIDING: dict[str, Any] = {**_WINDOW, "layer_types": list[Literal["full_attention", "sliding_attention"]] | None}
_QWEN: dict[str, Any] = {**_SLIDING, "use_sliding_window": bool, "max_window_layers": Annotated[int, Within(0)]}
_GEMMA: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}
_TANH = "gelu_pytorch_tanh"
# Parts of some families only: another family's config.json must not enable them.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
    "query_pre_attn_scalar": (None,),
}
# Attributes for which null means missing.
_NULL_IS_MISSING = ("head_dim", "hidden_act", "hidden_activation", "num_key_value_heads", "query_pre_attn_scalar")

SHARDING_RULES: ShardingRules = (
    (r"/embed_tokens/embedding$", P("tensor", "fsdp")),
    (r"/(q|k|v|gate|up)_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"/(q|k|v|gate|up)_proj/bias$", P(None, "tensor")),
    (r"/(o|down)_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"/(o|down)_proj/bias$", P()),
    (r"/lm_head/kernel$", P("fsdp", "tensor")),
    (r"/score/kernel$", P("fsdp")),
    (r"norm/scale$", P()),
)


def tensor_names(config: DecoderConfig, task: TaskName) -> dict[str, TensorName]:
    """The tensor names of every leaf of the network for ``task``, in transformers' class for it."""
    bare, layers = task == "features", config.num_hidden_layers
    path, module = ("params", "") if bare else ("params/model", "model.")

    def stacked(part: str) -> tuple[str, str]:
        return f"{path}/layers/{part}", f"{module}layers.{{}}.{part.replace('/', '.')}"

    found = embedding(f"{path}/embed_tokens", f"{module}embed_tokens", tied=tied_head(config, task))
    for part in ("q_proj", "k_proj", "v_proj"):
        found |= linear(*stacked(f"self_attn/{part}"), bias=config.qkv_bias, layers=layers)
    found |= linear(*stacked("self_attn/o_proj"), bias=config.output_bias, layers=layers)
    for part in ("gate_proj", "up_proj", "down_proj"):
        found |= linear(*stacked(f"mlp/{part}"), bias=config.mlp_bias, layers=layers)
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.sandwich_norms else []
    norms += ["self_attn/q_norm", "self_attn/k_norm"] if config.qk_norm else []
    for part in norms:
        found |= norm(*stacked(part), bias=False, layers=layers)
    return found | norm(f"{path}/norm", f"{module}norm", bias=False) | head_names(config, task)


@dataclass(frozen=True)
class _Variant:
    """One ``model_type`` and its config.json.

    Attributes:
      types: of its additional attributes.
      defaults: values of attributes that a config.json lacks.
      fields: values of fields that are fixed for the variant.
      has: its parts from `_OPTIONAL`.
      ignored: attributes without effect.
      fixed: attributes with their only supported values.
      repeats: attributes that must equal another one.
      slides: whether the layer at an index has a window, in the absence of ``layer_types``.
      derive: further fields, from a config.json completed by the defaults.
    """

    types: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    has: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    repeats: Mapping[str, str] = field(default_factory=dict)
    slides: Callable[[Mapping[str, Any], int], bool] = lambda hf, layer: False
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {}

    def read(self, hf: Mapping[str, Any]) -> DecoderConfig:
        """The configuration from the content of a config.json."""
        full = self.with_defaults(hf)
        absent = {name: values for name, values in _OPTIONAL.items() if name not in self.has}
        config = read_config(
            DecoderConfig,
            hf,
            others={**_COMMON, **self.types},
            ignored=self.ignored,
            fixed={**absent, **{name: (full.get(other),) for name, other in self.repeats.items()}, **self.fixed},
            # With head_dim, the heads' total width may differ from the network's.
            divides=[] if "head_dim" in full else [("num_attention_heads", "hidden_size")],
            derive=self.derived,
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ModelError(
                f"num_key_value_heads = {config.num_key_value_heads}; expected a divisor of num_attention_heads = "
                f"{config.num_attention_heads}"
            )
        return config

    def with_defaults(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a config.json, completed by the variant's defaults."""
        stated = {name: value for name, value in hf.items() if value is not None or name not in _NULL_IS_MISSING}
        return {"hidden_act": "silu", "tie_word_embeddings": False, **self.defaults, **stated}

    def derived(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The derived fields, from a config.json whose attributes have the declared types."""
        hf = self.with_defaults(hf)
        heads = hf["num_attention_heads"]
        size = hf.get("head_dim") or hf["hidden_size"] // heads
        bias = hf.get("attention_bias", False)
        computed = {
            "head_dim": size,
            "num_key_value_heads": hf.get("num_key_value_heads", heads),
            "query_pre_attn_scalar": hf.get("query_pre_attn_scalar", size),
            "rope": read_rope(hf, size),
            "windows": self.windows(hf),
            "qkv_bias": bias,
            "output_bias": bias,
        }
        stated = ("hidden_act", "tie_word_embeddings", *(self.has & set(hf)))
        return {**computed, **{name: hf[name] for name in stated}, **self.fields, **self.derive(hf)}

    def windows(self, hf: Mapping[str, Any]) -> tuple[int | None, ...]:
        """The window of each layer, by ``layer_types``.

        Raises:
          ModelError: if their number differs from that of the layers, or one slides without a window.
        """
        layers = hf["num_hidden_layers"]
        window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
        slides = [self.slides(hf, i) for i in range(layers)]
        if stated := hf.get("layer_types"):
            slides = [kind == "sliding_attention" for kind in stated]
        if len(slides) != layers:
            raise ModelError(f"layer_types has {len(slides)} entries for {layers} layers (num_hidden_layers)")
        if window is None and any(slides):
            raise ModelError("layer_types holds 'sliding_attention', but sliding_window is not set or not used; set it")
        return tuple(window if sliding else None for sliding in slides)


def _qwen_slides(hf: Mapping[str, Any], layer: int) -> bool:
    used = hf["use_sliding_window"] and hf["sliding_window"] is not None
    return used and layer >= hf["max_window_layers"]


_QWEN_DEFAULTS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA_FIELDS = {"norm_offset": True, "scaled_embedding": True}
_LLAMA = _Variant(
    types=_BIAS,
    has=frozenset({"mlp_bias"}),
    ignored=frozenset({"is_llama_config", "max_sequence_length"}),
    fixed={"rope_interleaved": (False,)},
)
_MISTRAL = _Variant(
    types=_WINDOW,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    slides=lambda hf, layer: hf["sliding_window"] is not None,
)
_QWEN2 = _Variant(
    types=_QWEN,
    defaults=_QWEN_DEFAULTS,
    fields={"qkv_bias": True},
    fixed={"use_mrope": (False,)},
    slides=_qwen_slides,
)
_QWEN3 = _Variant(
    types=_QWEN | _BIAS, defaults={**_QWEN_DEFAULTS, "head_dim": 128}, fields={"qk_norm": True}, slides=_qwen_slides
)
_GEMMA1 = _Variant(
    types=_BIAS,
    defaults={**_GEMMA_DEFAULTS, "hidden_act": "gelu"},
    fields=_GEMMA_FIELDS,
    fixed={**_GEMMA, "hidden_activation": (None, _TANH)},
    # The first checkpoints use "gelu" for its approximation.
    derive=lambda hf: {"hidden_act": _TANH if hf["hidden_act"] == "gelu" else hf["hidden_act"]},
)
_GEMMA2 = _Variant(
    types=_SLIDING | _BIAS | {"hidden_activation": Activation | None},
    defaults={
        **_GEMMA_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": _TANH,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    fields={**_GEMMA_FIELDS, "sandwich_norms": True},
    has=frozenset({"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}),
    fixed=_GEMMA,
    repeats={"sliding_window_size": "sliding_window"},
    slides=lambda hf, layer: layer % 2 == 0,
    derive=lambda hf: {"hidden_act": hf["hidden_activation"]},
)


def _family(variant: _Variant, architecture: str) -> Family:
    return Family(
        config=variant.read,
        networks={
            "features": Decoder,
            "causal-lm": DecoderForCausalLM,
            "sequence-classification": DecoderForSequenceClassification,
        },
        tensor_names=tensor_names,
        sharding_rules=SHARDING_RULES,
        prefix="model.",
        architecture=architecture,
        heads=r"^params/(lm_head|score)/",
        # A tied model's file may also hold the embedding as its head; old files hold the frequencies.
        unread=r"^(lm_head|score)\.|rotary_emb\.inv_freq$",
    )


LLAMA = _family(_LLAMA, "Llama")
MISTRAL = _family(_MISTRAL, "Mistral")
QWEN2 = _family(_QWEN2, "Qwen2")
QWEN3 = _family(_QWEN3, "Qwen3")
GEMMA = _family(_GEMMA1, "Gemma")
GEMMA2 = _family(_GEMMA2, "Gemma2")
