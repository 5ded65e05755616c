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
    LayerInput,
    LayerStack,
    layer_inputs,
    linear_init,
    scanned_layers,
    with_cached,
)
from jlora.models._family import Epsilon, Layers, Rate, Size
from jlora.models._heads import LanguageModel, SequenceClassifier
from jlora.models._layers import Activation, Part, activation, layer_norm
from jlora.models._mesh import split_batch
from jlora.models.attention.attend import attend
from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring


@dataclass(frozen=True)
class GPT2Config(CausalConfig):
    """The fields of a config.json of ``model_type`` gpt2."""

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


class GPT2(LayerStack):
    """The decoder. Each layer sows its states as ``intermediates/h/hidden`` [layers, batch, length, n_embd]."""

    config: GPT2Config
    title = "GPT-2"

    def setup(self) -> None:
        config, dtypes = self.config, self.dtypes
        self.wte = nn.Embed(config.vocab_size, config.n_embd, embedding_init=linear_init(config), **dtypes)
        self.wpe = nn.Embed(config.n_positions, config.n_embd, embedding_init=linear_init(config), **dtypes)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = scanned_layers(Block, config.n_layer, remat=self.remat)(config, **dtypes)
        self.ln_f = layer_norm(config.layer_norm_epsilon, **dtypes)

    def embed(self, input_ids: jax.Array, position_ids: jax.Array, deterministic: bool) -> jax.Array:
        return self.drop(self.wte(input_ids) + self.wpe(position_ids), deterministic=deterministic)

    def apply_layers(
        self, x: jax.Array, position_ids: jax.Array, mask: Mask, cache: Cache | None, deterministic: bool
    ) -> tuple[jax.Array, Any]:
        scale = None
        if self.config.scale_attn_by_inverse_layer_idx:
            scale = 1 / jnp.arange(1, self.config.n_layer + 1, dtype=jnp.float32)
        x, slots = self.h(x, layer_inputs(cache, scale=scale), mask, deterministic)
        return self.ln_f(x), slots

    def token_table(self) -> jax.Array:
        return self.wte.embedding


class Block(Part):
    """Attention, then an MLP, each with a residual connection and a norm before it."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, mask: Mask, deterministic: bool) -> tuple[jax.Array, Any]:
        """[batch, length, n_embd] to the same shape, and the layer's (keys, values) for the next cache."""
        config, dtypes = self.config, self.dtypes
        dropout = nn.Dropout(config.resid_pdrop, deterministic=deterministic)
        x = split_batch(x)
        attention = Attention(config, **dtypes, name="attn")
        y, slots = attention(
            layer_norm(config.layer_norm_epsilon, name="ln_1", **dtypes)(x), layer, mask, deterministic
        )
        x = x + dropout(y)
        y = MLP(config, **dtypes, name="mlp")(layer_norm(config.layer_norm_epsilon, name="ln_2", **dtypes)(x))
        x = x + dropout(y)
        self.sow("intermediates", "hidden", x)
        return x, slots


class Attention(Part):
    """Causal attention; ``c_attn`` computes queries, keys and values in one product."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInput, mask: Mask, deterministic: bool) -> tuple[jax.Array, Any]:
        config, dtypes = self.config, self.dtypes
        fused = _dense(config, 3 * config.n_embd, "c_attn", **dtypes)(x)
        query, key, value = (part.reshape(*x.shape[:2], config.n_head, -1) for part in jnp.split(fused, 3, axis=-1))
        key, value = with_cached(layer, key, value, mask.start)
        if layer.scale is not None:
            query = query * layer.scale.astype(query.dtype)
        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        drop = None if deterministic or not config.attn_pdrop else self.make_rng("dropout")
        y = attend(query, key, value, mask, Scoring(scale, rate=config.attn_pdrop, key=drop))
        y = _dense(config, config.n_embd, "c_proj", residual=True, **dtypes)(y.reshape(x.shape))
        return y, None if layer.keys is None else (key, value)


class MLP(Part):
    """Two linear layers."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtypes = self.config, self.dtypes
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        y = activation(config.activation_function)(_dense(config, inner, "c_fc", **dtypes)(x))
        return _dense(config, config.n_embd, "c_proj", residual=True, **dtypes)(y)


class GPT2ForCausalLM(LanguageModel):
    """GPT-2 and the logits of the next token."""

    network, below = GPT2, "transformer"


class GPT2ForSequenceClassification(SequenceClassifier):
    """GPT-2 and a linear head on the last token."""

    network, below = GPT2, "transformer"


def _dense(config: GPT2Config, features: int, name: str, *, residual: bool = False, **options: Any) -> nn.Dense:
    # As in the paper, the residual layers' initial scale shrinks with their number.
    start = config.initializer_range * ((2 * config.n_layer) ** -0.5 if residual else 1.0)
    return nn.Dense(features, kernel_init=nn.initializers.normal(start), name=name, **options)
