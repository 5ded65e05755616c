"""The encoder of BERT and RoBERTa, with a pooler or a head for classifying sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models._encoder import Encoded, EncoderConfig, EncoderPart
from jlora.models._family import INTERNAL, Rate, Size, Token, check_length
from jlora.models._layers import Network, Part, dense, layer_norm, recomputed
from jlora.models._mesh import split_batch
from jlora.models.attention.mask import Mask, make_mask


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The fields of a config.json of ``model_type`` bert or roberta.

    Attributes:
      roberta: positions count from ``pad_token_id + 1`` and skip padding; the head is two layers on the first token.
    """

    vocab_size: Size = 30522
    classifier_dropout: Rate | None = None
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    pad_token_id: Token | None = 0
    roberta: bool = field(default=False, metadata=INTERNAL)

    @property
    def max_length(self) -> int | None:
        """The number of positions for tokens; RoBERTa reserves its first positions for padding."""
        return self.max_position_embeddings - (1 + (self.pad_token_id or 0) if self.roberta else 0)


class Bert(Network):
    """The encoder. Each layer sows its states as ``intermediates/layer_{i}/hidden``."""

    config: BertConfig
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
          attention_mask: [batch, length], 0 at padding; by default there is none.
          token_type_ids: int [batch, length], which sentence of a pair; by default 0.
          position_ids: int [batch, length]; by default from 0; for RoBERTa see `BertConfig`.
          deterministic: no dropout; otherwise pass ``rngs={"dropout": key}``.

        Raises:
          ModelError: if there are more tokens than positions, and no ``position_ids``.
        """
        config, dtypes = self.config, self.dtypes
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        if position_ids is None:
            check_length("RoBERTa" if config.roberta else "BERT", input_ids.shape[1], config.max_length)
            position_ids = _positions(config, input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)

        def embed(rows: int, name: str) -> nn.Embed:
            start = nn.initializers.normal(config.initializer_range)
            return nn.Embed(rows, config.hidden_size, embedding_init=start, name=name, **dtypes)

        x = embed(config.vocab_size, "word_embeddings")(input_ids)
        x = x + embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        x = x + embed(config.max_position_embeddings, "position_embeddings")(position_ids)
        x = dropout(layer_norm(config.layer_norm_eps, name="embeddings_norm", **dtypes)(x))

        real = None if attention_mask is None else attention_mask.astype(bool)
        mask = make_mask(input_ids, *input_ids.shape[1:] * 2, causal=False, form=self.attention, real=real)
        layer = recomputed(Layer, self.remat, static=3)
        for i in range(config.num_hidden_layers):
            x = layer(config, **dtypes, name=f"layer_{i}")(x, mask, deterministic)
        if not self.pooler:
            return Encoded(x, None)
        return Encoded(x, jnp.tanh(dense(config, config.hidden_size, "pooler", **dtypes)(x[:, 0])))


class Layer(EncoderPart):
    """Attention, then an MLP, each with a residual connection and a norm after it."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask, deterministic: bool) -> jax.Array:
        """[batch, length, hidden_size] to the same shape."""
        dropout, epsilon = self.dropout(deterministic), self.config.layer_norm_eps
        x = split_batch(x)
        y = dropout(self.attention(x, mask, deterministic))
        x = layer_norm(epsilon, name="attention_norm", **self.dtypes)(x + y)
        y = dropout(self.mlp(x))
        x = layer_norm(epsilon, name="output_norm", **self.dtypes)(x + y)
        self.sow("intermediates", "hidden", x)
        return x


class BertForSequenceClassification(Network):
    """The encoder, and a linear head on the pooled first token; in RoBERTa a head of two layers."""

    config: BertConfig

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
        config, dtypes = self.config, self.dtypes
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        dropout = nn.Dropout(rate, deterministic=deterministic)
        encoder = Bert(
            config, remat=self.remat, attention=self.attention, pooler=not config.roberta, name="encoder", **dtypes
        )
        hidden, pooled = encoder(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        if pooled is not None:
            return dense(config, config.num_labels, "classifier", **dtypes)(dropout(pooled))
        return RobertaHead(config, name="classifier", **dtypes)(hidden[:, 0], dropout)


class RobertaHead(Part):
    """A hidden layer and the logits."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, dropout: nn.Dropout) -> jax.Array:
        """[batch, hidden_size] to [batch, num_labels]."""
        config, dtypes = self.config, self.dtypes
        x = jnp.tanh(dense(config, config.hidden_size, "dense", **dtypes)(dropout(x)))
        return dense(config, config.num_labels, "out_proj", **dtypes)(dropout(x))


def _positions(config: BertConfig, input_ids: jax.Array) -> jax.Array:
    """From 0; RoBERTa counts only tokens, from ``pad_token_id + 1``, and puts padding at ``pad_token_id``."""
    if not config.roberta:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    padding = config.pad_token_id or 0
    seen = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(seen, axis=1) * seen + padding
