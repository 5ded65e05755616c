"""The encoder of BERT and RoBERTa, with a pooler or a head for classifying sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models._family import (
    INTERNAL,
    Epsilon,
    Layers,
    ModelConfig,
    Rate,
    Size,
    Spread,
    Token,
    check_length,
)
from jlora.models._layers import (
    Activation,
    Encoded,
    Remat,
    activation,
    attend,
    dense,
    layer_norm,
    recomputed,
    split_batch,
)


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """As in a config.json of ``model_type`` bert or roberta.

    Attributes:
      roberta: positions count from ``pad_token_id + 1`` and skip padding; the head is two layers on the first token.
    """

    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    classifier_dropout: Rate | None = None
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    initializer_range: Spread = 0.02
    layer_norm_eps: Epsilon = 1e-12
    pad_token_id: Token | None = 0
    roberta: bool = field(default=False, metadata=INTERNAL)

    @property
    def max_length(self) -> int | None:
        """The number of tokens that have a position; RoBERTa's first ones are for padding."""
        return self.max_position_embeddings - (1 + (self.pad_token_id or 0) if self.roberta else 0)


class Bert(nn.Module):
    """The encoder. The states of every layer are sown as ``intermediates/layer_{i}/hidden``."""

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"
    pooler: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Encoded:
        """Encode a batch of token sequences.

        Args:
          input_ids: int [batch, length].
          attention_mask: [batch, length], 0 where a token is padding; by default all are seen.
          token_type_ids: int [batch, length], which sentence of a pair; by default 0.
          position_ids: int [batch, length]; by default from 0, in RoBERTa as the class says.
          deterministic: no dropout; otherwise give ``rngs={"dropout": key}``.

        Raises:
          ModelError: if the tokens are more than the positions, and ``position_ids`` does not say where they are.
        """
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        if position_ids is None:
            check_length("RoBERTa" if config.roberta else "BERT", input_ids.shape[1], config.max_length)
            position_ids = _positions(config, input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)

        def embed(rows: int, name: str) -> nn.Embed:
            start = nn.initializers.normal(config.initializer_range)
            return nn.Embed(rows, config.hidden_size, embedding_init=start, name=name, **made)

        x = embed(config.vocab_size, "word_embeddings")(input_ids)
        x = x + embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        x = x + embed(config.max_position_embeddings, "position_embeddings")(position_ids)
        x = dropout(layer_norm(config.layer_norm_eps, name="embeddings_norm", **made)(x))

        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, :]
        layer = recomputed(Layer, self.remat, static=3)
        for i in range(config.num_hidden_layers):
            x = layer(config, self.dtype, self.param_dtype, name=f"layer_{i}")(x, mask, deterministic)
        if not self.pooler:
            return Encoded(x, None)
        return Encoded(x, jnp.tanh(dense(config, config.hidden_size, "pooler", **made)(x[:, 0])))


class Layer(nn.Module):
    """Attention, then an MLP; each is added to its input and normalized after."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """[batch, length, hidden_size] to the same; ``mask`` broadcasts to [batch, length, length]."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        attention_dropout = nn.Dropout(config.attention_probs_dropout_prob, deterministic=deterministic)
        width, heads = config.hidden_size, config.num_attention_heads
        x = split_batch(x)

        query, key, value = (
            dense(config, width, name, **made)(x).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value")
        )
        y = attend(query, key, value, mask, scale=query.shape[-1] ** -0.5, dropout=attention_dropout)
        y = dropout(dense(config, width, "attention_output", **made)(y.reshape(x.shape)))
        x = layer_norm(config.layer_norm_eps, name="attention_norm", **made)(x + y)

        y = activation(config.hidden_act)(dense(config, config.intermediate_size, "intermediate", **made)(x))
        y = dropout(dense(config, width, "output", **made)(y))
        x = layer_norm(config.layer_norm_eps, name="output_norm", **made)(x + y)
        self.sow("intermediates", "hidden", x)
        return x


class BertForSequenceClassification(nn.Module):
    """The encoder, and a linear head on the pooled first token; in RoBERTa a head of two layers."""

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits [batch, num_labels]; the arguments are those of `Bert`."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        dropout = nn.Dropout(rate, deterministic=deterministic)
        encoder = Bert(config, remat=self.remat, pooler=not config.roberta, name="encoder", **made)
        hidden, pooled = encoder(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        if pooled is not None:
            return dense(config, config.num_labels, "classifier", **made)(dropout(pooled))
        return RobertaHead(config, name="classifier", **made)(hidden[:, 0], dropout)


class RobertaHead(nn.Module):
    """A hidden layer and the logits."""

    config: BertConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, dropout: nn.Dropout) -> jax.Array:
        """[batch, hidden_size] to [batch, num_labels]."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.tanh(dense(config, config.hidden_size, "dense", **made)(dropout(x)))
        return dense(config, config.num_labels, "out_proj", **made)(dropout(x))


def _positions(config: BertConfig, input_ids: jax.Array) -> jax.Array:
    """From 0; RoBERTa counts the tokens that are no padding, from ``pad_token_id + 1``, and gives padding that id."""
    if not config.roberta:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    padding = config.pad_token_id or 0
    seen = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(seen, axis=1) * seen + padding
