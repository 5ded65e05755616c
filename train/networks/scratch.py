"""Small image networks to train from scratch: a patch transformer and an MLP."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jlora
from jlora.models import Remat, recomputed
from train.config import ConfigError, ImageClassification, Mlp, PatchTransformer
from train.networks.network import Inputs, Network

RULES: dict[type, jlora.ShardingRules] = {
    Mlp: ((r"hidden_\d+/kernel$", P("fsdp", "tensor")), (r"head/kernel$", P("fsdp")), (r"bias$", P())),
    PatchTransformer: (
        (r"(query|key|value|up)/kernel$", P("fsdp", "tensor")),
        (r"out/kernel$", P("tensor", None, "fsdp")),
        (r"down/kernel$", P("tensor", "fsdp")),
        (r"embed/kernel$", P(None, "fsdp")),
        (r"head/kernel$", P("fsdp")),
        (r"(bias|scale|positions)$", P()),
    ),
}
"""A block's products form pairs: the first is sharded along its outputs, the second along its inputs."""


def from_scratch(config: PatchTransformer | Mlp, task: ImageClassification, remat: Remat) -> Network:
    """A network for a task's images, scaled to [-1, 1].

    Raises:
      ConfigError: if the patches do not divide the images.
    """
    assert task.side and task.labels
    side, classes = task.side, len(task.labels)
    if isinstance(config, PatchTransformer):
        if side % config.patch:
            raise ConfigError(f"model.patch: got {config.patch}, expected a divisor of the images' side, {side}")
        module: nn.Module = _PatchTransformer(config, classes, remat)
    else:
        module = _Mlp(config, classes)

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, side, side, 1)))["params"]

    def forward(params: Any, inputs: Inputs, key: jax.Array | None = None) -> Any:
        return module.apply({"params": params}, inputs["images"])

    return Network(forward, init, RULES[type(config)], mean=0.5, std=0.5)


class _Mlp(nn.Module):
    config: Mlp
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float32 [batch, side, side, channels], to logits, float32 [batch, classes]."""
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


class _Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each with a residual connection."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, patches, width] to the same shape."""
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class _PatchTransformer(nn.Module):
    """Cut the image into patches, embed each with its position, transform, average, classify."""

    config: PatchTransformer
    classes: int
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float32 [batch, side, side, channels], to logits, float32 [batch, classes]."""
        config = self.config
        x = nn.Dense(config.width, name="embed")(patches(images, config.patch))
        x = x + self.param("positions", nn.initializers.normal(0.2), x.shape[1:])
        block = recomputed(_Block, self.remat)
        for layer in range(config.depth):
            x = block(config.heads, config.hidden, name=f"block_{layer}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="head")(x)


def patches(images: jax.Array, side: int) -> jax.Array:
    """[batch, height, width, channels] to [batch, patches, pixels of a patch], both row by row."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // side, side, width // side, side, channels)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, -1, side * side * channels)
