"""The Vision Transformer, with a pooler or a head for classifying images."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.files.errors import ModelError
from jlora.models._encoder import Encoded, EncoderConfig, EncoderPart
from jlora.models._family import Rate, Size
from jlora.models._layers import Activation, Network, activation, dense, layer_norm, recomputed
from jlora.models._mesh import split_batch
from jlora.models.attention.mask import Mask, make_mask


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """The fields of a config.json of ``model_type`` vit.

    Attributes:
      image_size, patch_size: in pixels; images and patches are square.
      qkv_bias: whether query, key and value have a bias.
      pooler_output_size: by default ``hidden_size``.
    """

    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: Size = 3
    qkv_bias: bool = True
    pooler_output_size: Size | None = None
    pooler_act: Activation = "tanh"


class ViT(Network):
    """The encoder. Each layer sows its states, before the final norm, as ``intermediates/layer_{i}/hidden``."""

    config: ViTConfig
    pooler: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> Encoded:
        """Encode a batch of images.

        Args:
          images: float [batch, image_size, image_size, num_channels], normalized as in the checkpoint's
            preprocessor_config.json.
          deterministic: no dropout; otherwise pass ``rngs={"dropout": key}``.

        Raises:
          ModelError: if the images have another size.
        """
        config, dtypes = self.config, self.dtypes
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        expected = (config.image_size, config.image_size, config.num_channels)
        if images.shape[1:] != expected:
            raise ModelError(
                f"images of shape {images.shape}; expected [batch, height, width, channels] with {expected} after the "
                "batch. Resize them; positions are not interpolated."
            )
        start = nn.initializers.normal(config.initializer_range)
        convolution = nn.Conv(width, patch, patch, "VALID", kernel_init=start, name="patch_embeddings", **dtypes)
        x = convolution(images.astype(self.dtype)).reshape(images.shape[0], -1, width)

        token = self.param("cls_token", start, (1, 1, width), self.param_dtype).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, width)), x], axis=1)
        x = x + self.param("position_embeddings", start, (1, *x.shape[1:]), self.param_dtype).astype(x.dtype)
        x = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(x)

        mask = make_mask(x, *x.shape[1:2] * 2, causal=False, form=self.attention)
        layer = recomputed(Layer, self.remat, static=3)
        for i in range(config.num_hidden_layers):
            x = layer(config, **dtypes, name=f"layer_{i}")(x, mask, deterministic)
        x = layer_norm(config.layer_norm_eps, name="final_norm", **dtypes)(x)
        if not self.pooler:
            return Encoded(x, None)
        pooled = dense(config, config.pooler_output_size or width, "pooler", **dtypes)(x[:, 0])
        return Encoded(x, activation(config.pooler_act)(pooled))


class Layer(EncoderPart):
    """Attention, then an MLP, each with a residual connection and a norm before it."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask, deterministic: bool) -> jax.Array:
        """[batch, 1 + patches, hidden_size] to the same shape."""
        dropout, epsilon = self.dropout(deterministic), self.config.layer_norm_eps
        x = split_batch(x)
        y = layer_norm(epsilon, name="attention_norm", **self.dtypes)(x)
        x = x + dropout(self.attention(y, mask, deterministic, use_bias=self.config.qkv_bias))
        y = layer_norm(epsilon, name="output_norm", **self.dtypes)(x)
        x = x + dropout(self.mlp(y))
        self.sow("intermediates", "hidden", x)
        return x


class ViTForImageClassification(Network):
    """The encoder, and a linear head on the class token."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Logits [batch, num_labels]; the arguments are those of `ViT`."""
        config, dtypes = self.config, self.dtypes
        encoder = ViT(config, remat=self.remat, attention=self.attention, pooler=False, name="encoder", **dtypes)
        return dense(config, config.num_labels, "classifier", **dtypes)(encoder(images, deterministic).hidden[:, 0])
