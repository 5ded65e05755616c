"""The heads of decoders: for the next token, and for classifying sequences."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.files.tensor_names import TensorName, linear
from jlora.models._causal import Cache, CausalConfig, linear_init
from jlora.models._family import TaskName
from jlora.models._layers import Network
from jlora.models._loss import Head, token_losses


class _WithHead(Network):
    """A decoder with a head. Subclasses set the decoder's class, and its name in transformers."""

    network: ClassVar[Any]
    below: ClassVar[str]

    def decoder(self) -> Any:
        """The decoder below the head."""
        return self.network(self.config, self.dtype, self.param_dtype, self.remat, self.attention, name=self.below)


class LanguageModel(_WithHead):
    """A decoder and the logits of the next token."""

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        last_only: bool = False,
        labels: jax.Array | None = None,
        smoothing: float = 0.0,
        chunk: int | None = None,
    ) -> Any:
        """The logits of the token after each token; or, with labels, its loss and the most probable token.

        All logits take ``batch * length * vocab_size * 4`` bytes. For losses, large logits are computed in chunks of
        tokens, and not again in the backward pass, unless the output projection itself is trained or adapted:

        >>> losses, predictions = model.apply(params, tokens[:, :-1], labels=tokens[:, 1:])

        Args:
          input_ids: int [batch, length].
          attention_mask: [batch, length], 0 or False at padding, on either side; by default there is none.
          position_ids: int [batch, length]; by default from 0 (padding counts), or from the end of the cache.
          segment_ids: int [batch, length], for packed sequences: a token attends only to its segment, and by default
            the positions of each segment start at 0.
          cache: from `init_cache` or the last call; this call's tokens follow those in it.
          deterministic: no dropout; otherwise pass ``rngs={"dropout": key}``.
          last_only: return only the last token's logits, [batch, 1, vocab_size].
          labels: int [batch, length], the token after each token; the caller masks the losses of padding and prompts.
          smoothing: label smoothing, the share of a label's probability that is spread over the vocabulary (Szegedy et
            al. 2015, section 7).
          chunk: the number of tokens of each row whose logits are computed at a time. By default all of them, or about
            512 tokens on each device if the logits there exceed 512 MiB.

        Returns:
          float32 [batch, length, vocab_size]; with labels, a `TokenLosses`; with a cache, also the next cache.
        """
        decoder, config = self.decoder(), self.config
        x, following = decoder.run(input_ids, attention_mask, position_ids, segment_ids, cache, deterministic)
        if config.tie_word_embeddings:
            weight = decoder.token_table()
        else:
            size = x.shape[-1], config.vocab_size
            weight = _Weight(size, linear_init(config), self.param_dtype, name="lm_head")()
        head = Head(config.tie_word_embeddings, config.final_logit_softcapping)
        weight = weight.astype(self.dtype)
        if labels is None:
            result = head.logits(x[:, -1:] if last_only else x, weight)
        else:
            result = token_losses(x, weight, labels, head, smoothing=smoothing, chunk=chunk)
        return result if cache is None else (result, following)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for ``length`` tokens, the prompt included; by default in the dtype of the computation."""
        layers, heads, size = self.config.cache_shape
        empty = jnp.zeros((layers, batch, length, heads, size), dtype or self.dtype)
        return Cache(empty, empty, jnp.zeros((batch, length), bool), jnp.int32(0))


class _Weight(nn.Module):
    """The kernel of a linear layer."""

    shape: tuple[int, int]
    initializer: nn.initializers.Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", self.initializer, self.shape, self.param_dtype)


class SequenceClassifier(_WithHead):
    """A decoder and a linear head without bias on the last token that is not padding."""

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits float32 [batch, num_labels]; the arguments are those of `LanguageModel`.

        As in transformers, this is the last token other than ``pad_token_id``, whatever the mask; if the
        configuration has no ``pad_token_id``, it is the last one in the mask.
        """
        x, _ = self.decoder().run(input_ids, attention_mask, position_ids, None, None, deterministic)
        last = _last_token(input_ids, attention_mask, self.config.pad_token_id)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return _head(self, self.config.num_labels, "score")(x)


def _last_token(input_ids: jax.Array, attention_mask: jax.Array | None, pad_token_id: int | None) -> jax.Array:
    """int [batch]: the index of the last token that is not padding; 0 if all are padding."""
    if pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        real = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
    return jnp.argmax(jnp.where(real, jnp.arange(input_ids.shape[1]), 0), axis=1)


def _head(module: _WithHead, features: int, name: str) -> nn.Dense:
    """A projection to logits: inputs in the network's dtype, float32 accumulation and result."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=linear_init(module.config),
        dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),  # pyright: ignore[reportArgumentType]
        name=name,
    )


def head_names(config: CausalConfig, task: TaskName) -> dict[str, TensorName]:
    """The tensor names of the head for ``task``; a tied language model and the bare network have none."""
    if task == "causal-lm" and not config.tie_word_embeddings:
        return linear("params/lm_head", "lm_head", bias=False)
    return linear("params/score", "score", bias=False) if task == "sequence-classification" else {}


def tied_head(config: CausalConfig, task: TaskName) -> str | None:
    """The module tied to the embedding, if any."""
    return "lm_head" if task == "causal-lm" and config.tie_word_embeddings else None
