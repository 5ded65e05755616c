"""One decoder for Llama, Mistral, Qwen 2 and 3, and Gemma 1 and 2, by its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models._causal import (
    Cache,
    CausalConfig,
    LayerInput,
    LayerStack,
    distinct,
    layer_inputs,
    linear_init,
    scanned_layers,
    with_cached,
)
from jlora.models._family import DERIVED, INTERNAL, Epsilon, Layers, Positive, Rate, Size
from jlora.models._heads import LanguageModel, SequenceClassifier
from jlora.models._layers import Activation, Part, activation, dense
from jlora.models._mesh import split_batch
from jlora.models.attention.attend import attend
from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring
from jlora.models.decoder.rope import Rope, rotate, rotations


@dataclass(frozen=True)
class DecoderConfig(CausalConfig):
    """Fields of a config.json, and fields that `table` derives from others.

    Attributes:
      head_dim: the size of a head; not always ``hidden_size / num_attention_heads``.
      rope: how positions rotate queries and keys.
      windows: for each layer the number of tokens that it attends to, the current one included; None for all.
      query_pre_attn_scalar: scores are divided by its square root.
      qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
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


class Decoder(LayerStack):
    """The decoder. Each layer sows its states as ``intermediates/layers/hidden`` [layers, batch, length, width]."""

    config: DecoderConfig
    title = "the decoder"

    def setup(self) -> None:
        config, dtypes = self.config, self.dtypes
        start = linear_init(config)
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=start, **dtypes)
        self.layers = scanned_layers(Layer, config.num_hidden_layers, remat=self.remat)(config, **dtypes)
        self.norm = RMSNorm(config.rms_norm_eps, config.norm_offset, **dtypes)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    def embed(self, input_ids: jax.Array, position_ids: jax.Array, deterministic: bool) -> jax.Array:
        x = self.embed_tokens(input_ids)
        # Gemma was trained with this factor rounded to the computation's dtype.
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scaled_embedding else x

    def apply_layers(
        self, x: jax.Array, position_ids: jax.Array, mask: Mask, cache: Cache | None, deterministic: bool
    ) -> tuple[jax.Array, Any]:
        config, window = self.config, None
        rotation = rotations(config.rope, config.head_dim, position_ids)
        if len(sizes := distinct(config.windows)) > 1:
            window = jnp.asarray([sizes.index(size) for size in config.windows], jnp.int32)
        x, slots = self.layers(x, layer_inputs(cache, window=window), (mask, rotation), deterministic)
        return self.norm(x), slots

    def token_table(self) -> jax.Array:
        return self.embed_tokens.embedding


class Layer(Part):
    """Attention, then an MLP, each with a residual connection and a norm before it (sandwich norms: also after it)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, shared: Any, deterministic: bool) -> tuple[jax.Array, Any]:
        """[batch, length, hidden_size] to the same shape, and the layer's (keys, values) for the next cache."""
        config, dtypes = self.config, self.dtypes
        mask, rotation = shared
        x = split_batch(x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name, **dtypes)(x)

        attention = Attention(config, name="self_attn", **dtypes)
        mlp = MLP(config, name="mlp", **dtypes)
        y, slots = attention(norm("input_layernorm", x), layer, mask, rotation, deterministic)
        if config.sandwich_norms:
            x = x + norm("post_attention_layernorm", y)
            y = norm("post_feedforward_layernorm", mlp(norm("pre_feedforward_layernorm", x)))
        else:
            x = x + y
            y = mlp(norm("post_attention_layernorm", x))
        x = x + y
        self.sow("intermediates", "hidden", x)
        return x, slots


class Attention(Part):
    """Causal attention with rotary positions and grouped query heads, within the layer's window."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: LayerInput,
        mask: Mask,
        rotation: tuple[jax.Array, jax.Array],
        deterministic: bool,
    ) -> tuple[jax.Array, Any]:
        config, dtypes = self.config, self.dtypes

        def heads(name: str, count: int) -> jax.Array:
            y = dense(config, count * config.head_dim, name, use_bias=config.qkv_bias, **dtypes)(x)
            return y.reshape(*x.shape[:2], count, config.head_dim)

        query = heads("q_proj", config.num_attention_heads)
        key = heads("k_proj", config.num_key_value_heads)
        value = heads("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            query = RMSNorm(config.rms_norm_eps, config.norm_offset, name="q_norm", **dtypes)(query)
            key = RMSNorm(config.rms_norm_eps, config.norm_offset, name="k_norm", **dtypes)(key)
        key, value = with_cached(layer, rotate(key, *rotation), value, mask.start)
        drop = None if deterministic or not config.attention_dropout else self.make_rng("dropout")
        scale = config.query_pre_attn_scalar**-0.5
        scoring = Scoring(scale, config.attn_logit_softcapping, config.attention_dropout, drop)
        y = attend(rotate(query, *rotation), key, value, mask, scoring, layer.window)
        output = dense(config, config.hidden_size, "o_proj", use_bias=config.output_bias, **dtypes)
        return output(y.reshape(*x.shape[:2], -1)), None if layer.keys is None else (key, value)


class MLP(Part):
    """A gated MLP (Shazeer 2020)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, options = self.config, {"use_bias": self.config.mlp_bias, **self.dtypes}
        gate = activation(config.hidden_act)(dense(config, config.intermediate_size, "gate_proj", **options)(x))
        y = gate * dense(config, config.intermediate_size, "up_proj", **options)(x)
        return dense(config, config.hidden_size, "down_proj", **options)(y)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019), in float32, rounded once at the end.

    Attributes:
      offset: multiply by 1 + scale; the scale then starts at 0.
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


class DecoderForCausalLM(LanguageModel):
    """The decoder and the logits of the next token."""

    network, below = Decoder, "model"


class DecoderForSequenceClassification(SequenceClassifier):
    """The decoder and a linear head on the last token."""

    network, below = Decoder, "model"
