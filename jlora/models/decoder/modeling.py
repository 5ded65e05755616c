"""A decoder whose configuration makes it Llama, Mistral, Qwen 2 and 3, or Gemma 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models._causal import (
    Cache,
    CausalConfig,
    CausalLM,
    LayerInput,
    SequenceClassifier,
    Sight,
    default_positions,
    layer_inputs,
    layered,
    linear_init,
    next_cache,
    remember,
    sight,
    unembed,
)
from jlora.models._family import DERIVED, INTERNAL, Epsilon, Layers, Positive, Rate, Size
from jlora.models._layers import Activation, Remat, activation, attend, split_batch
from jlora.models.decoder.rope import Rope, rotate, rotations


@dataclass(frozen=True)
class DecoderConfig(CausalConfig):
    """Fields of a config.json by their names there, and what the table made of the others.

    Attributes:
      head_dim: the size of a head; not always ``hidden_size / num_attention_heads``.
      rope: how positions turn queries and keys.
      windows: for each layer how many tokens back it sees, itself included; None for all.
      query_pre_attn_scalar: scores are divided by its square root.
      qkv_bias, output_bias, mlp_bias: which linear layers have one.
      qk_norm: heads of queries and keys are normalized (Qwen 3).
      norm_offset: norms multiply by 1 + their scale (Gemma).
      scaled_embedding: embeddings are multiplied by the square root of the width (Gemma).
      sandwich_norms: attention and MLP have a norm before and after them (Gemma 2).
      attn_logit_softcapping: None, or the bound of the scores (Gemma 2).
    """

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size = field(metadata=DERIVED)
    head_dim: Size = field(metadata=DERIVED)
    hidden_act: Activation = field(metadata=DERIVED)
    rope: Rope = field(metadata=INTERNAL)
    windows: tuple[int | None, ...] = field(metadata=INTERNAL)
    query_pre_attn_scalar: Positive = field(metadata=DERIVED)
    rms_norm_eps: Epsilon = 1e-6
    attention_dropout: Rate = 0.0
    qkv_bias: bool = field(default=False, metadata=INTERNAL)
    output_bias: bool = field(default=False, metadata=INTERNAL)
    mlp_bias: bool = False
    qk_norm: bool = field(default=False, metadata=INTERNAL)
    norm_offset: bool = field(default=False, metadata=INTERNAL)
    scaled_embedding: bool = field(default=False, metadata=INTERNAL)
    sandwich_norms: bool = field(default=False, metadata=INTERNAL)
    attn_logit_softcapping: Positive | None = None

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.num_hidden_layers, self.num_key_value_heads, self.head_dim


class Decoder(nn.Module):
    """The decoder. Each layer's states are sown, as ``intermediates/layers/hidden`` [layers, batch, length, width]."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"

    def setup(self) -> None:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        start = linear_init(config)
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=start, **made)
        self.layers = layered(Layer, config.num_hidden_layers, remat=self.remat)(config, **made)
        self.norm = RMSNorm(config.rms_norm_eps, config.norm_offset, **made)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The last layer's states [batch, length, hidden_size], normalized; the arguments are those of `CausalLM`."""
        return self.run(input_ids, attention_mask, position_ids, segment_ids, None, deterministic)[0]

    def run(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Cache | None]:
        """The states, and the next cache if there is one."""
        config, shape = self.config, input_ids.shape
        x = self.embed_tokens(input_ids)
        if config.scaled_embedding:
            # Gemma was trained with this factor rounded to the dtype in which it computes.
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        if position_ids is None:
            position_ids = default_positions(shape, segment_ids, cache)
        turns = rotations(config.rope, config.head_dim, position_ids)
        scope = sight(shape, attention_mask, segment_ids, cache)
        window = None
        if any(w is not None for w in config.windows):
            window = jnp.asarray([jnp.iinfo(jnp.int32).max if w is None else w for w in config.windows], jnp.int32)
        x, slots = self.layers(x, layer_inputs(cache, window=window), (scope, turns), deterministic)
        return self.norm(x), next_cache(cache, slots, scope)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits by the tied embedding, float32 [batch, length, vocab_size]."""
        return unembed(x, self.embed_tokens.embedding, self.dtype)


class Layer(nn.Module):
    """Attention and an MLP, each on the normalized input and added to it (with sandwich norms, normalized again)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, shared: Any, deterministic: bool) -> tuple[jax.Array, Any]:
        """[batch, length, hidden_size] to the same, and the layer's slots of the next cache."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scope, turns = shared
        x = split_batch(x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name, **made)(x)

        attention = Attention(config, name="self_attn", **made)
        mlp = MLP(config, name="mlp", **made)
        y, slots = attention(norm("input_layernorm", x), layer, scope, turns, deterministic)
        if config.sandwich_norms:
            x = x + norm("post_attention_layernorm", y)
            y = norm("post_feedforward_layernorm", mlp(norm("pre_feedforward_layernorm", x)))
        else:
            x = x + y
            y = mlp(norm("post_attention_layernorm", x))
        x = x + y
        self.sow("intermediates", "hidden", x)
        return x, slots


class Attention(nn.Module):
    """Causal attention with rotary positions, in groups of query heads, within the layer's window."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: LayerInput,
        scope: Sight,
        turns: tuple[jax.Array, jax.Array],
        deterministic: bool,
    ) -> tuple[jax.Array, Any]:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, count: int) -> jax.Array:
            y = _dense(config, count * config.head_dim, name, config.qkv_bias, **made)(x)
            return y.reshape(*x.shape[:2], count, config.head_dim)

        query = heads("q_proj", config.num_attention_heads)
        key = heads("k_proj", config.num_key_value_heads)
        value = heads("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            query = RMSNorm(config.rms_norm_eps, config.norm_offset, name="q_norm", **made)(query)
            key = RMSNorm(config.rms_norm_eps, config.norm_offset, name="k_norm", **made)(key)
        key, value = remember(layer, rotate(key, *turns), value, scope.used)
        mask = scope.mask if layer.window is None else scope.mask & (scope.distance < layer.window)
        y = attend(
            rotate(query, *turns),
            key,
            value,
            mask,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            dropout=nn.Dropout(config.attention_dropout, deterministic=deterministic),
        )
        y = _dense(config, config.hidden_size, "o_proj", config.output_bias, **made)(y.reshape(*x.shape[:2], -1))
        return y, None if layer.keys is None else (key, value)


class MLP(nn.Module):
    """A gated MLP (Shazeer 2020)."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = activation(config.hidden_act)(
            _dense(config, config.intermediate_size, "gate_proj", config.mlp_bias, **made)(x)
        )
        y = gate * _dense(config, config.intermediate_size, "up_proj", config.mlp_bias, **made)(x)
        return _dense(config, config.hidden_size, "down_proj", config.mlp_bias, **made)(y)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019), in float32 with one rounding at the end.

    Attributes:
      offset: multiply by 1 + scale, which then starts at 0.
    """

    epsilon: float
    offset: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * (1 + scale if self.offset else scale)).astype(self.dtype)


class DecoderForCausalLM(CausalLM):
    """The decoder and the logits of the next token."""

    network, below = Decoder, "model"


class DecoderForSequenceClassification(SequenceClassifier):
    """The decoder and a linear head on the last token."""

    network, below = Decoder, "model"


def _dense(config: DecoderConfig, features: int, name: str, bias: bool, **made: Any) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=linear_init(config), name=name, **made)
