"""Shared parts of the encoders: configuration, attention, MLP and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax

from jlora.files.tensor_names import TensorName, linear, norm
from jlora.models._family import Epsilon, Layers, ModelConfig, NonNegative, Rate, Size
from jlora.models._layers import Activation, Part, activation, dense
from jlora.models.attention.attend import attend
from jlora.models.attention.mask import Mask
from jlora.models.attention.plain import Scoring


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """Shared fields of the encoders, by their names in a config.json."""

    hidden_size: Size = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    initializer_range: NonNegative = 0.02
    layer_norm_eps: Epsilon = 1e-12


class Encoded(NamedTuple):
    """An encoder's output for a batch of texts or images.

    Attributes:
      hidden: [batch, length, hidden_size], the states of all tokens or patches.
      pooled: [batch, size of the pooler], from the first state; None without a pooler.
    """

    hidden: jax.Array
    pooled: jax.Array | None


class EncoderPart(Part):
    """A part of an encoder's layer; call these methods in a ``nn.compact`` method."""

    def dropout(self, deterministic: bool) -> nn.Dropout:
        """The dropout of hidden states."""
        return nn.Dropout(self.config.hidden_dropout_prob, deterministic=deterministic)

    def attention(self, x: jax.Array, mask: Mask, deterministic: bool, *, use_bias: bool = True) -> jax.Array:
        """Self-attention, [batch, length, hidden_size] to the same shape.

        Args:
          x: the states.
          mask: the keys that each state sees.
          deterministic: no dropout.
          use_bias: whether query, key and value have a bias.
        """
        config, heads = self.config, self.config.num_attention_heads
        rate = config.attention_probs_dropout_prob
        drop = None if deterministic or not rate else self.make_rng("dropout")
        query, key, value = (
            dense(config, config.hidden_size, name, use_bias=use_bias, **self.dtypes)(x).reshape(
                *x.shape[:2], heads, -1
            )
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value, mask, Scoring(query.shape[-1] ** -0.5, rate=rate, key=drop))
        return dense(config, config.hidden_size, "attention_output", **self.dtypes)(y.reshape(x.shape))

    def mlp(self, x: jax.Array) -> jax.Array:
        """Two linear layers, [batch, length, hidden_size] to the same shape."""
        config = self.config
        y = dense(config, config.intermediate_size, "intermediate", **self.dtypes)(x)
        return dense(config, config.hidden_size, "output", **self.dtypes)(activation(config.hidden_act)(y))


def layer_names(
    path: str, module: str, linears: Mapping[str, str], norms: Mapping[str, str], without_bias: tuple[str, ...] = ()
) -> dict[str, TensorName]:
    """The tensor names of one layer: ``linears`` and ``norms`` map our names of its modules to PyTorch's.

    Args:
      path, module: of the layer, here and in PyTorch.
      without_bias: the linear layers that have no bias.
    """
    found: dict[str, TensorName] = {}
    for ours, theirs in linears.items():
        found |= linear(f"{path}/{ours}", f"{module}.{theirs}", bias=ours not in without_bias)
    for ours, theirs in norms.items():
        found |= norm(f"{path}/{ours}", f"{module}.{theirs}")
    return found
