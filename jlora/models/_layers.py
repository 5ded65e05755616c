"""Shared parts of several families: base classes, activations, and rematerialization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.fields import OneOf
from jlora.files.errors import ModelError
from jlora.models.attention.mask import AttentionForm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_fast": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}

Activation: TypeAlias = Annotated[str, OneOf(tuple(ACTIVATIONS))]
"""The name of an activation in a config.json."""

Remat: TypeAlias = Literal["none", "dots", "full"]
"""What the backward pass recomputes of each layer: nothing, all but its products with weights, or everything."""

_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Part(nn.Module):
    """A part of a network.

    Attributes:
      config: of the network.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        """Both dtypes, as arguments of other modules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Network(Part):
    """A network, or its stack of layers.

    Attributes:
      remat: what the backward pass recomputes of each layer.
      attention: how attention is computed.
    """

    remat: Remat = "none"
    attention: AttentionForm = "auto"


def dense(config: Any, features: int, name: str, **options: Any) -> nn.Dense:
    """A linear layer with the family's initializer; ``options`` are those of Flax's ``Dense``."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(config.initializer_range), name=name, **options)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function by its name in a config.json."""
    return ACTIVATIONS[name]


def layer_norm(epsilon: float, name: str | None = None, **options: Any) -> nn.LayerNorm:
    """A layer norm whose variance is accurate even if the mean is much larger than the deviation, like PyTorch's."""
    return nn.LayerNorm(epsilon, use_fast_variance=False, name=name, **options)


def recomputed(layer: type[nn.Module], remat: Remat, *, static: int | None = None, scanned: bool = False) -> Any:
    """``layer`` with rematerialization; its parameters keep their names.

    Args:
      remat: what the backward pass recomputes.
      static: the position of the call's non-array argument, counting ``self``.
      scanned: whether the layer is used in `nn.scan`, which already keeps XLA from merging the two computations.

    Raises:
      ModelError: if ``remat`` is not one of its values.
    """
    if remat == "none":
        return layer
    if remat not in _POLICIES:
        raise ModelError(f"remat = {remat!r}; expected 'none', or the parts to recompute: 'dots' or 'full'")
    return nn.remat(
        layer, policy=_POLICIES[remat], static_argnums=() if static is None else (static,), prevent_cse=not scanned
    )
