"""Where the parameters of Llama, Mistral, Qwen and Gemma lie in a checkpoint, and what sets these apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from jax.sharding import PartitionSpec as P

from jlora._src.tree.sharding import ShardingRules
from jlora.fields import Within
from jlora.files.tensor_names import TensorName, embedding, linear, norm
from jlora.models._family import Family, ModelError, PositiveOrNull, SizeOrNull, Task, read_config
from jlora.models._layers import Activation
from jlora.models.decoder.modeling import (
    Decoder,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
)
from jlora.models.decoder.rope import read_rope

# Attributes that are no fields, and what they may be; fields are worked out from them.
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
_TANH = (None, "gelu_pytorch_tanh")
# Parts that only some families have: another's config.json must not switch them on.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
    "query_pre_attn_scalar": (None,),
}

RULES: ShardingRules = (
    (r"/embed_tokens/embedding$", P("tensor", "fsdp")),
    (r"/(q|k|v|gate|up)_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"/(q|k|v|gate|up)_proj/bias$", P(None, "tensor")),
    (r"/(o|down)_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"/(o|down)_proj/bias$", P()),
    (r"/lm_head/kernel$", P("fsdp", "tensor")),
    (r"/score/kernel$", P("fsdp")),
    (r"norm/scale$", P()),
)


def names(config: DecoderConfig, task: Task) -> dict[str, TensorName]:
    """Every leaf of the network for ``task``, and its tensor's name in transformers' class for it."""
    bare, layers = task == "features", config.num_hidden_layers
    path, module = ("params", "") if bare else ("params/model", "model.")

    def stacked(part: str) -> tuple[str, str]:
        return f"{path}/layers/{part}", f"{module}layers.{{}}.{part.replace('/', '.')}"

    tied = "lm_head" if task == "causal-lm" and config.tie_word_embeddings else None
    found = embedding(f"{path}/embed_tokens", f"{module}embed_tokens", tied=tied)
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
    found |= norm(f"{path}/norm", f"{module}norm", bias=False)
    if task == "causal-lm" and not config.tie_word_embeddings:
        found |= linear("params/lm_head", "lm_head", bias=False)
    if task == "sequence-classification":
        found |= linear("params/score", "score", bias=False)
    return found


def _read(
    hf: Mapping[str, Any],
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {},
    *,
    others: Mapping[str, Any] | None = None,
    ignored: frozenset[str] = frozenset(),
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    own: frozenset[str] = frozenset(),
    head_dim: int | None = None,
    key_heads: int | None = None,
) -> DecoderConfig:
    """The configuration, with what is common to all; ``head_dim`` and ``key_heads`` are the family's
    defaults, ``own`` the parts that it has of those which others lack, ``derive`` and ``others`` what it works out."""

    def derived(hf: Mapping[str, Any]) -> dict[str, Any]:
        heads = hf["num_attention_heads"]
        size = hf.get("head_dim") or head_dim or hf["hidden_size"] // heads
        return {
            "head_dim": size,
            "num_key_value_heads": hf.get("num_key_value_heads") or key_heads or heads,
            "hidden_act": hf.get("hidden_act") or "silu",
            "rope": read_rope(hf, size),
            "windows": (None,) * hf["num_hidden_layers"],
            "query_pre_attn_scalar": size,
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
            **derive(hf),
        }

    config = read_config(
        DecoderConfig,
        hf,
        others=_COMMON | dict(others or {}),
        ignored=ignored,
        fixed={name: values for name, values in _ABSENT.items() if name not in own} | dict(fixed or {}),
        # A size of its own may make the heads wider or narrower than the network.
        divides=[] if hf.get("head_dim") or head_dim else [("num_attention_heads", "hidden_size")],
        derive=derived,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"num_key_value_heads = {config.num_key_value_heads}; expected a divisor of num_attention_heads = "
            f"{config.num_attention_heads}"
        )
    return config


def _biases(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _llama(hf: Mapping[str, Any]) -> DecoderConfig:
    ignored = frozenset({"is_llama_config", "max_sequence_length"})
    fixed = {"rope_interleaved": (False,)}
    return _read(hf, _biases, others=_BIAS, ignored=ignored, fixed=fixed, own=frozenset({"mlp_bias"}))


def _mistral(hf: Mapping[str, Any]) -> DecoderConfig:
    def windows(hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"windows": (hf.get("sliding_window", 4096),) * hf["num_hidden_layers"]}

    return _read(hf, windows, others=_WINDOW, key_heads=8)


def _qwen2(hf: Mapping[str, Any]) -> DecoderConfig:
    def own(hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"windows": _qwen_windows(hf), "qkv_bias": True}

    return _read(hf, own, others=_QWEN, fixed={"use_mrope": (False,)})


def _qwen3(hf: Mapping[str, Any]) -> DecoderConfig:
    def own(hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"windows": _qwen_windows(hf), "qk_norm": True, **_biases(hf)}

    return _read(hf, own, others=_QWEN | _BIAS, head_dim=128)


def _gemma(hf: Mapping[str, Any]) -> DecoderConfig:
    def own(hf: Mapping[str, Any]) -> dict[str, Any]:
        # The first files say "gelu", and mean its approximation.
        stated = hf.get("hidden_act") or "gelu"
        return {
            "hidden_act": "gelu_pytorch_tanh" if stated == "gelu" else stated,
            "tie_word_embeddings": hf.get("tie_word_embeddings", True),
            "norm_offset": True,
            "scaled_embedding": True,
            **_biases(hf),
        }

    return _read(hf, own, others=_BIAS, fixed=_GEMMA | {"hidden_activation": _TANH}, head_dim=256)


def _gemma2(hf: Mapping[str, Any]) -> DecoderConfig:
    def own(hf: Mapping[str, Any]) -> dict[str, Any]:
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])]
        return {
            "hidden_act": hf.get("hidden_activation") or "gelu_pytorch_tanh",
            "windows": _windows(hf, alternating, hf.get("sliding_window", 4096)),
            "tie_word_embeddings": hf.get("tie_word_embeddings", True),
            "query_pre_attn_scalar": hf.get("query_pre_attn_scalar") or 256,
            "attn_logit_softcapping": hf.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": hf.get("final_logit_softcapping", 30.0),
            "norm_offset": True,
            "scaled_embedding": True,
            "sandwich_norms": True,
            **_biases(hf),
        }

    return _read(
        hf,
        own,
        others=_SLIDING | _BIAS | {"hidden_activation": Activation | None},
        fixed=_GEMMA | {"sliding_window_size": (hf.get("sliding_window", 4096),)},
        own=frozenset({"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}),
        head_dim=256,
        key_heads=4,
    )


def _qwen_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers, first = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    return _windows(hf, kinds, window)


def _windows(hf: Mapping[str, Any], default: list[str], window: int | None) -> tuple[int | None, ...]:
    """For each layer its window, by the ``layer_types`` of a config.json.

    Raises:
      ModelError: if these are not as many as the layers, or slide without a window.
    """
    kinds = hf.get("layer_types") or default
    if len(kinds) != len(default):
        raise ModelError(f"layer_types has {len(kinds)} entries for {len(default)} layers (num_hidden_layers)")
    if window is None and "sliding_attention" in kinds:
        raise ModelError("layer_types holds 'sliding_attention', but sliding_window is not set or not used; set it")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _family(config: Any, architecture: str) -> Family:
    return Family(
        config=config,
        networks={
            "features": Decoder,
            "causal-lm": DecoderForCausalLM,
            "sequence-classification": DecoderForSequenceClassification,
        },
        names=names,
        rules=RULES,
        prefix="model.",
        architecture=architecture,
        heads=r"^params/(lm_head|score)/",
        # A tied model's file may hold the embedding once more as its head; old ones hold the frequencies.
        unread=r"^(lm_head|score)\.|rotary_emb\.inv_freq$",
    )


LLAMA = _family(_llama, "Llama")
MISTRAL = _family(_mistral, "Mistral")
QWEN2 = _family(_qwen2, "Qwen2")
QWEN3 = _family(_qwen3, "Qwen3")
GEMMA = _family(_gemma, "Gemma")
GEMMA2 = _family(_gemma2, "Gemma2")
