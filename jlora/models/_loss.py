"""The loss of each token of a language model, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jlora._src.engine.rules.control_flow import OWN_DERIVATIVE
from jlora.models._mesh import gathered, row_parts, split_batch

# By the estimates of v5e's compiler, logits of 500 tokens at a time cost the same as those of all tokens, and logits of
# 250 take 1.4 times as long: the weight is read too often. Logits of up to 512 MiB are not worth a loop.
_TOKENS = 512
_SMALL = 512 * 2**20


class TokenLosses(NamedTuple):
    """What a language model computes from labels in place of logits.

    Attributes:
      loss: float32 [batch, length], the cross entropy of each label.
      prediction: int32 [batch, length], the most probable tokens.
    """

    loss: jax.Array
    prediction: jax.Array


@dataclass(frozen=True)
class Head:
    """How states become logits; the weight is an argument.

    Attributes:
      tied: the weight is the embedding's table, [vocab, width]; otherwise it is [width, vocab].
      softcap: None, or the bound c of ``c * tanh(logits / c)``.
    """

    tied: bool
    softcap: float | None

    def logits(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """float32 [..., vocab], of states [..., width]."""
        return self.capped(self.product(x, weight))

    def product(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The logits before the soft cap."""
        product = "...d,vd->...v" if self.tied else "...d,dv->...v"
        return jnp.einsum(product, x, weight, preferred_element_type=jnp.float32)

    def transposed(self, slopes: jax.Array, weight: jax.Array) -> jax.Array:
        """The derivative in states, in the dtype of the weight, from that in their `product`."""
        product = "...v,vd->...d" if self.tied else "...v,dv->...d"
        return jnp.einsum(product, slopes.astype(weight.dtype), weight)

    def capped(self, product: jax.Array) -> jax.Array:
        """The logits of a `product`."""
        return product if self.softcap is None else self.softcap * jnp.tanh(product / self.softcap)

    def slope_of_cap(self, logits: jax.Array) -> jax.Array | float:
        """The derivative of `capped`, from its result."""
        return 1.0 if self.softcap is None else 1 - (logits / self.softcap) ** 2


@dataclass(frozen=True)
class _Loss:
    """The loss of a head. Hashable."""

    head: Head
    smoothing: float

    def __call__(self, x: jax.Array, weight: jax.Array, labels: jax.Array) -> TokenLosses:
        return self.of_product(self.head.product(x, weight), labels)[0]

    def of_product(self, product: jax.Array, labels: jax.Array) -> tuple[TokenLosses, jax.Array]:
        """The losses, and the derivative of each in its `Head.product`."""
        logits, smoothing = self.head.capped(product), self.smoothing
        # A gather would collect logits whose vocabulary is split over devices. Without the barrier, JAX would compute
        # the indices of all logits of a chunk before the loop, and keep them.
        indices, labels = jax.lax.optimization_barrier((jnp.arange(logits.shape[-1]), labels))
        one_hot = (indices == labels[..., None]).astype(logits.dtype)
        expected = (logits * one_hot).sum(axis=-1)
        if smoothing:
            expected = (1 - smoothing) * expected + smoothing * logits.mean(axis=-1)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        found = TokenLosses(normalizer - expected, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        slopes = jnp.exp(logits - normalizer[..., None]) - (1 - smoothing) * one_hot - smoothing / logits.shape[-1]
        return found, slopes * self.head.slope_of_cap(logits)


def token_losses(
    x: jax.Array, weight: jax.Array, labels: jax.Array, head: Head, *, smoothing: float, chunk: int | None
) -> TokenLosses:
    """The losses of states [batch, length, width], ``chunk`` tokens of each row at a time; None chooses.

    Args:
      labels: int [batch, length].
      smoothing: the share of a label's probability that is spread over the vocabulary.
    """
    loss = _Loss(head, smoothing)
    chunk = chunk or _chunk(x, weight.shape[0 if head.tied else 1])
    if chunk >= x.shape[1]:
        return loss(x, weight, labels)
    return _chunked(x, gathered(weight, 1 if head.tied else 0, x), labels, loss, chunk)


def _chunk(x: jax.Array, vocabulary: int) -> int:
    """How many tokens of each row are computed at a time: all if the logits are small, otherwise a power of two."""
    rows, length = x.shape[0] // row_parts(x), x.shape[1]
    if 4 * rows * length * vocabulary <= _SMALL:
        return length
    return 1 << (-(-_TOKENS // rows) - 1).bit_length()


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _chunked(x: jax.Array, weight: jax.Array, labels: jax.Array, loss: _Loss, chunk: int) -> TokenLosses:
    """The losses, with a derivative that does not compute the logits again, unless the weight is trained.

    With an adapted weight, `jlora.lora` differentiates this function itself.
    """
    x = checkpoint_name(x, OWN_DERIVATIVE)
    return _map(jax.checkpoint(lambda x, labels: loss(x, weight, labels), prevent_cse=False), chunk, x, labels)


@partial(_chunked.defjvp, symbolic_zeros=True)
def _chunked_jvp(loss: _Loss, chunk: int, primals: Any, tangents: Any) -> tuple[TokenLosses, TokenLosses]:
    (x, weight, labels), (dx, dweight, _) = primals, tangents
    head = loss.head

    def forward(x: jax.Array, labels: jax.Array) -> tuple[TokenLosses, jax.Array | None]:
        """The losses of a chunk, and the derivative of each in its state."""
        found, slopes = loss.of_product(head.product(x, weight), labels)
        return found, None if isinstance(dx, SymbolicZero) else head.transposed(slopes, weight)

    @partial(jax.checkpoint, prevent_cse=False)
    def in_weight(x: jax.Array, labels: jax.Array) -> jax.Array:
        slopes = loss.of_product(head.product(x, weight), labels)[1]
        return (slopes * head.product(x, dweight)).sum(axis=-1)

    found, slopes = _map(forward, chunk, x, labels)
    tangent = jnp.zeros_like(found.loss)
    if not isinstance(dx, SymbolicZero):
        tangent += (slopes.astype(jnp.float32) * dx.astype(jnp.float32)).sum(axis=-1)
    if not isinstance(dweight, SymbolicZero):
        dweight = dweight.astype(jnp.float32)  # so that the transpose sums the gradients of all chunks in float32
        tangent += _map(in_weight, chunk, x, labels)
    return found, TokenLosses(tangent, np.zeros(labels.shape, jax.dtypes.float0))  # pyright: ignore[reportArgumentType]


def _map(fn: Callable[..., Any], chunk: int, *arrays: jax.Array) -> Any:
    """``fn`` of ``chunk`` tokens of each row at a time; arrays [batch, length, ...] to results [batch, length, ...]."""
    batch, length = arrays[0].shape[:2]
    count = -(-length // chunk)
    chunk = -(-length // count)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * chunk, *x.shape[3:])[:, :length]

    results = jax.lax.map(lambda parts: fn(*map(split_batch, parts)), tuple(map(split, arrays)))
    return jax.tree.map(joined, results)
