"""The network: a patch transformer for small images. It knows nothing of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.config import IMAGE_SIDE, ModelConfig

Init = Callable[[jax.Array], Any]
"""``init(key)``: random parameters."""
Forward = Callable[[Any, jax.Array], jax.Array]
"""``forward(params, inputs)``: logits."""

HEAD = "head"
CLASSES = 10


def network(config: ModelConfig) -> tuple[Init, Forward]:
    """The network as two functions of its parameters. All else knows these two, and not which library made them."""
    model = PatchTransformer(config)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, IMAGE_SIDE, IMAGE_SIDE)))["params"]

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, images))

    return init, forward


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to its input."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, patches, width] to the same."""
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class PatchTransformer(nn.Module):
    """Cut the image into patches, embed each with its position, transform, average, classify."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float32 [batch, side, side] from 0 to 1, to logits, float32 [batch, classes]."""
        config = self.config
        x = patches(2 * images - 1, config.patch)
        x = nn.Dense(config.width, name="embed")(x)
        x = x + self.param("positions", nn.initializers.normal(0.2), x.shape[1:])
        for layer in range(config.depth):
            x = Block(config.heads, config.hidden, name=f"block_{layer}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(CLASSES, name=HEAD)(x)


def patches(images: jax.Array, side: int) -> jax.Array:
    """[batch, height, width] to [batch, patches, pixels of a patch], both row by row."""
    batch, height, width = images.shape
    grid = images.reshape(batch, height // side, side, width // side, side)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, -1, side * side)
