"""The Vision Transformer, with a pooler or a head for classifying images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models._family import Epsilon, Layers, ModelConfig, ModelError, Rate, Size, Spread
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
class ViTConfig(ModelConfig):
    """As in a config.json of ``model_type`` vit.

    Attributes:
      image_size, patch_size: in pixels; images and patches are square.
      qkv_bias: whether query, key and value have a bias.
      pooler_output_size: by default ``hidden_size``.
    """

    hidden_size: Size = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    initializer_range: Spread = 0.02
    layer_norm_eps: Epsilon = 1e-12
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: Size = 3
    qkv_bias: bool = True
    pooler_output_size: Size | None = None
    pooler_act: Activation = "tanh"


class ViT(nn.Module):
    """The encoder. The states of every layer, not yet normalized, are sown as ``intermediates/layer_{i}/hidden``."""

    config: ViTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"
    pooler: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> Encoded:
        """Encode a batch of images.

        Args:
          images: float [batch, image_size, image_size, num_channels], normalized as the checkpoint's
            preprocessor_config.json says.
          deterministic: no dropout; otherwise give ``rngs={"dropout": key}``.

        Raises:
          ModelError: if the images have another size.
        """
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        expected = (config.image_size, config.image_size, config.num_channels)
        if images.shape[1:] != expected:
            raise ModelError(
                f"images of shape {images.shape}; expected [batch, height, width, channels] with {expected} after the "
                "batch. Resize them; positions are not interpolated."
            )
        start = nn.initializers.normal(config.initializer_range)
        convolution = nn.Conv(width, patch, patch, "VALID", kernel_init=start, name="patch_embeddings", **made)
        x = convolution(images.astype(self.dtype)).reshape(images.shape[0], -1, width)

        token = self.param("cls_token", start, (1, 1, width), self.param_dtype).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, width)), x], axis=1)
        x = x + self.param("position_embeddings", start, (1, *x.shape[1:]), self.param_dtype).astype(x.dtype)
        x = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(x)

        layer = recomputed(Layer, self.remat, static=2)
        for i in range(config.num_hidden_layers):
            x = layer(config, self.dtype, self.param_dtype, name=f"layer_{i}")(x, deterministic)
        x = layer_norm(config.layer_norm_eps, name="final_norm", **made)(x)
        if not self.pooler:
            return Encoded(x, None)
        pooled = dense(config, config.pooler_output_size or width, "pooler", **made)(x[:, 0])
        return Encoded(x, activation(config.pooler_act)(pooled))


class Layer(nn.Module):
    """Attention, then an MLP; the input of each is normalized, and its output added."""

    config: ViTConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """[batch, 1 + patches, hidden_size] to the same."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        attention_dropout = nn.Dropout(config.attention_probs_dropout_prob, deterministic=deterministic)
        width, heads = config.hidden_size, config.num_attention_heads
        x = split_batch(x)

        y = layer_norm(config.layer_norm_eps, name="attention_norm", **made)(x)
        query, key, value = (
            dense(config, width, name, use_bias=config.qkv_bias, **made)(y).reshape(*y.shape[:2], heads, -1)
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value, None, scale=query.shape[-1] ** -0.5, dropout=attention_dropout)
        x = x + dropout(dense(config, width, "attention_output", **made)(y.reshape(x.shape)))

        y = layer_norm(config.layer_norm_eps, name="output_norm", **made)(x)
        y = activation(config.hidden_act)(dense(config, config.intermediate_size, "intermediate", **made)(y))
        x = x + dropout(dense(config, width, "output", **made)(y))
        self.sow("intermediates", "hidden", x)
        return x


class ViTForImageClassification(nn.Module):
    """The encoder, and a linear head on the class token."""

    config: ViTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Logits [batch, num_labels]; the arguments are those of `ViT`."""
        config, made = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = ViT(config, remat=self.remat, pooler=False, name="encoder", **made)
        return dense(config, config.num_labels, "classifier", **made)(encoder(images, deterministic).hidden[:, 0])
