"""GPT-2, bare, as a language model, and for classifying sequences."""

from __future__ import annotations

from dataclasses import dataclass
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
from jlora.models._family import Epsilon, Layers, Rate, Size, check_length
from jlora.models._layers import Activation, Remat, activation, attend, layer_norm, split_batch


@dataclass(frozen=True)
class GPT2Config(CausalConfig):
    """As in a config.json of ``model_type`` gpt2."""

    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Layers = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: Activation = "gelu_new"
    resid_pdrop: Rate = 0.1
    embd_pdrop: Rate = 0.1
    attn_pdrop: Rate = 0.1
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.n_layer, self.n_head, self.n_embd // self.n_head

    @property
    def max_length(self) -> int | None:
        return self.n_positions


class GPT2(nn.Module):
    """The decoder. Each layer's states are sown, as ``intermediates/h/hidden`` [layers, batch, length, n_embd]."""

    config: GPT2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"

    def setup(self) -> None:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.wte = nn.Embed(config.vocab_size, config.n_embd, embedding_init=linear_init(config), **made)
        self.wpe = nn.Embed(config.n_positions, config.n_embd, embedding_init=linear_init(config), **made)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = layered(Block, config.n_layer, remat=self.remat)(config, self.dtype, self.param_dtype)
        self.ln_f = layer_norm(config.layer_norm_epsilon, **made)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The last layer's states [batch, length, n_embd], normalized; the arguments are those of `CausalLM`."""
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
        """The states, and the next cache if there is one.

        Raises:
          ModelError: if the tokens are more than the positions, and ``position_ids`` does not say where they are;
            also of packed sequences, whose lengths are not known when this is compiled.
        """
        config, shape = self.config, input_ids.shape
        if position_ids is None:
            check_length("GPT-2", shape[1], config.max_length)
            position_ids = default_positions(shape, segment_ids, cache)
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids), deterministic=deterministic)
        scope = sight(shape, attention_mask, segment_ids, cache)
        scale = None
        if config.scale_attn_by_inverse_layer_idx:
            scale = 1 / jnp.arange(1, config.n_layer + 1, dtype=jnp.float32)
        x, slots = self.h(x, layer_inputs(cache, scale=scale), scope, deterministic)
        return self.ln_f(x), next_cache(cache, slots, scope)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits by the tied embedding, float32 [batch, length, vocab_size]."""
        return unembed(x, self.wte.embedding, self.dtype)


class Block(nn.Module):
    """Attention and an MLP, each on the normalized input and added to it."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, scope: Sight, deterministic: bool) -> tuple[jax.Array, Any]:
        """[batch, length, n_embd] to the same, and the layer's slots of the next cache."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = nn.Dropout(config.resid_pdrop, deterministic=deterministic)
        x = split_batch(x)
        attention = Attention(config, self.dtype, self.param_dtype, name="attn")
        y, slots = attention(layer_norm(config.layer_norm_epsilon, name="ln_1", **made)(x), layer, scope, deterministic)
        x = x + dropout(y)
        y = MLP(config, self.dtype, self.param_dtype, name="mlp")(
            layer_norm(config.layer_norm_epsilon, name="ln_2", **made)(x)
        )
        x = x + dropout(y)
        self.sow("intermediates", "hidden", x)
        return x, slots


class Attention(nn.Module):
    """Causal attention; ``c_attn`` makes queries, keys and values in one product."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, scope: Sight, deterministic: bool) -> tuple[jax.Array, Any]:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fused = _dense(config, 3 * config.n_embd, "c_attn", **made)(x)
        query, key, value = (part.reshape(*x.shape[:2], config.n_head, -1) for part in jnp.split(fused, 3, axis=-1))
        key, value = remember(layer, key, value, scope.used)
        if layer.scale is not None:
            query = query * layer.scale.astype(query.dtype)
        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        dropout = nn.Dropout(config.attn_pdrop, deterministic=deterministic)
        y = attend(query, key, value, scope.mask, scale=scale, dropout=dropout)
        y = _dense(config, config.n_embd, "c_proj", residual=True, **made)(y.reshape(x.shape))
        return y, None if layer.keys is None else (key, value)


class MLP(nn.Module):
    """Two linear layers."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        y = activation(config.activation_function)(_dense(config, inner, "c_fc", **made)(x))
        return _dense(config, config.n_embd, "c_proj", residual=True, **made)(y)


class GPT2ForCausalLM(CausalLM):
    """GPT-2 and the logits of the next token."""

    network, below = GPT2, "transformer"


class GPT2ForSequenceClassification(SequenceClassifier):
    """GPT-2 and a linear head on the last token."""

    network, below = GPT2, "transformer"


def _dense(config: GPT2Config, features: int, name: str, *, residual: bool = False, **made: Any) -> nn.Dense:
    # The paper's start: what is added to the residual stream is smaller the more layers add to it.
    start = config.initializer_range * ((2 * config.n_layer) ** -0.5 if residual else 1.0)
    return nn.Dense(features, kernel_init=nn.initializers.normal(start), name=name, **made)
