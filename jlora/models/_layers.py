"""Parts that several families share: activations, attention, and what the backward pass keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.fields import OneOf
from jlora.models._family import ModelError

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
"""The name of one, as a config.json gives it."""

Remat: TypeAlias = Literal["none", "dots", "full"]
"""What the backward pass computes again of each layer: nothing; all but its matrix products with weights; or all."""

_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Encoded(NamedTuple):
    """What an encoder makes of a batch of texts or images.

    Attributes:
      hidden: [batch, length, hidden_size], the states of every token or patch.
      pooled: [batch, size of the pooler], of the first one; None without a pooler.
    """

    hidden: jax.Array
    pooled: jax.Array | None


def dense(config: Any, features: int, name: str, **made: Any) -> nn.Dense:
    """A linear layer that starts as the family's do; ``made`` goes to Flax's."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(config.initializer_range), name=name, **made)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a config.json names."""
    return ACTIVATIONS[name]


def layer_norm(epsilon: float, name: str | None = None, **made: Any) -> nn.LayerNorm:
    """A layer norm whose variance does not cancel where the mean is large beside the spread, as in PyTorch's."""
    return nn.LayerNorm(epsilon, use_fast_variance=False, name=name, **made)


def recomputed(layer: type[nn.Module], remat: Remat, *, static: int | None = None, scanned: bool = False) -> Any:
    """``layer``, of which the backward pass computes again what ``remat`` says; its parameters keep their names.

    Args:
      static: which argument of the layer's call is no array, ``self`` counted.
      scanned: the layer is for `nn.scan`, which itself keeps XLA from merging the two computations.

    Raises:
      ModelError: if there is no such ``remat``.
    """
    if remat == "none":
        return layer
    if remat not in _POLICIES:
        raise ModelError(f"remat = {remat!r}; expected 'none', or what is computed again: 'dots' or 'full'")
    return nn.remat(
        layer, policy=_POLICIES[remat], static_argnums=() if static is None else (static,), prevent_cse=not scanned
    )


def split_batch(x: jax.Array) -> jax.Array:
    """``x`` [batch, ...], its batch split over the axes ``data`` and ``fsdp`` of the mesh on which it lies, if any.

    Where weights are split over ``fsdp``, the compiler would else split the features of the activations over it, and
    hold the whole batch on every device. Nothing is done on axes that are not Auto, or that do not divide the batch.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in ("data", "fsdp") if kinds.get(name) == AxisType.Auto)
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes)))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Scaled dot-product attention; each key head serves a group of query heads (Ainslie et al. 2023).

    Args:
      query: [batch, length, heads, dim].
      key, value: [batch, keys, key heads, dim], where the key heads divide the heads.
      mask: None, or booleans that broadcast to [batch, length, keys]: what a query may see.
      scale: of the scores, usually ``dim ** -0.5``.
      softcap: None, or the bound c of ``c * tanh(score / c)`` (Gemma 2).
      dropout: applied to the weights.

    Returns:
      [batch, length, heads, dim], in the dtype of ``query``; scores and softmax are float32.
    """
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # Not -inf: a row that may see nothing (padding) would be NaN, and poison the gradient.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(query.dtype))
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, dim)
