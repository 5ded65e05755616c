"""Parts that decoders share: what a token may see, the cache of keys and values, and the heads."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.fields import fits
from jlora.messages import shown
from jlora.models._family import ModelConfig, ModelError, Positive, Size, Spread, Token
from jlora.models._layers import Remat, recomputed


@dataclasses.dataclass(frozen=True)
class CausalConfig(ModelConfig):
    """What the heads need to know of a decoder's configuration.

    Attributes:
      vocab_size: the number of tokens.
      initializer_range: the standard deviation with which new weights start.
      tie_word_embeddings: the embedding of the tokens is also the output projection.
      final_logit_softcapping: None, or the bound c of ``c * tanh(logits / c)``.
      pad_token_id: the token that a classifier does not take for the last one.
    """

    vocab_size: Size = dataclasses.field(kw_only=True)
    initializer_range: Spread = dataclasses.field(default=0.02, kw_only=True)
    tie_word_embeddings: bool = dataclasses.field(default=True, kw_only=True)
    final_logit_softcapping: Positive | None = dataclasses.field(default=None, kw_only=True)
    pad_token_id: Token | None = dataclasses.field(default=None, kw_only=True)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key heads, and the size of a head."""
        raise NotImplementedError

    @property
    def max_length(self) -> int | None:
        """The number of positions that there are, or None if they do not end."""
        return None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens after which a text has ended: those of generation_config.json, else of config.json, else none.

        Raises:
          ModelError: if the ``eos_token_id`` there is neither a token nor a list of tokens.
        """
        for file, text in (("generation_config.json", self.generation), ("config.json", self.hf)):
            stated = json.loads(text or "{}").get("eos_token_id")
            if stated is None:
                continue
            if not fits(stated, Token | list[Token]):
                raise ModelError(
                    f"{file}: eos_token_id = {shown(stated)}; expected a token, or a list of tokens. Correct the file, "
                    "or pass eos_token_id to generate"
                )
            return tuple(stated) if isinstance(stated, list) else (stated,)
        return ()


class Cache(NamedTuple):
    """The keys and values of the tokens that were seen so far; functional: a call returns the next one.

    Attributes:
      keys, values: [layers, batch, slots, key heads, head size].
      seen: bool [batch, slots], which slots hold a token that is no padding.
      used: int32 scalar, the number of slots that are taken.
    """

    keys: jax.Array
    values: jax.Array
    seen: jax.Array
    used: jax.Array


class Sight(NamedTuple):
    """What each token may see.

    Attributes:
      mask: bool [batch or 1, length, slots].
      distance: int32 [length, slots], how many tokens back a slot is; for sliding windows.
      used: int32 scalar, the slot of the first token of this call.
      seen: that of the next cache; None without one.
    """

    mask: jax.Array
    distance: jax.Array
    used: jax.Array
    seen: jax.Array | None


class LayerInput(NamedTuple):
    """What differs from layer to layer beside the parameters, each with a leading axis of layers, or None.

    Attributes:
      keys, values: of the cache.
      window: int32, how many tokens back the layer sees, itself included.
      scale: float32, of the scores.
    """

    keys: jax.Array | None
    values: jax.Array | None
    window: jax.Array | None
    scale: jax.Array | None


def sight(
    shape: tuple[int, ...], attention_mask: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None
) -> Sight:
    """What the tokens of a call see: themselves and earlier tokens of their segment, no padding.

    Args:
      shape: (batch, length) of the tokens.
      attention_mask: [batch, length], 0 or False at padding; None if there is none.
      segment_ids: int [batch, length], for packed sequences.
      cache: that of the tokens before.

    Raises:
      ValueError: for segments together with a cache, or a cache that has fewer slots than there are tokens.
    """
    length = shape[1]
    real = None if attention_mask is None else attention_mask.astype(bool)
    if cache is None:
        slots, used, seen = length, jnp.int32(0), None
    elif segment_ids is not None:
        raise ValueError("segment_ids together with a cache; packed sequences are for training: give one of the two")
    elif cache.seen.shape[1] < length:
        raise ValueError(f"{length} tokens for a cache of {cache.seen.shape[1]} slots; make it with init_cache for all")
    else:
        slots, used = cache.seen.shape[1], cache.used
        new = jnp.ones(shape, bool) if real is None else real
        real = seen = jax.lax.dynamic_update_slice_in_dim(cache.seen, new, used, axis=1)
    distance = used + jnp.arange(length)[:, None] - jnp.arange(slots)
    mask = (distance >= 0)[None]
    if real is not None:
        mask = mask & real[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return Sight(mask, distance, used, seen)


def default_positions(shape: tuple[int, ...], segment_ids: jax.Array | None, cache: Cache | None) -> jax.Array:
    """int [1 or batch, length], from 0 or where the cache ends; anew in each segment. Padding counts."""
    index = jnp.arange(shape[1])[None]
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index if cache is None else index + cache.used


def layer_inputs(cache: Cache | None, *, window: jax.Array | None = None, scale: jax.Array | None = None) -> LayerInput:
    """What the layers get of the cache, and their own numbers."""
    return LayerInput(None, None, window, scale) if cache is None else LayerInput(*cache[:2], window, scale)


def next_cache(cache: Cache | None, slots: Any, scope: Sight) -> Cache | None:
    """The cache after a call whose layers returned ``slots``, (keys, values)."""
    if cache is None or scope.seen is None:
        return None
    keys, values = slots
    return Cache(keys, values, scope.seen, scope.used + scope.mask.shape[1])


def remember(layer: LayerInput, key: jax.Array, value: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All keys and values that a layer may look at: those of this call, after those of the cache if there is one."""
    if layer.keys is None or layer.values is None:
        return key, value
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=used, axis=1)
    return write(layer.keys, key.astype(layer.keys.dtype)), write(layer.values, value.astype(layer.values.dtype))


def layered(layer: type[nn.Module], length: int, *, remat: Remat) -> Any:
    """``layer`` scanned over stacked parameters: ``(x, LayerInput, shared, deterministic) -> (x, (keys, values))``."""
    return nn.scan(
        recomputed(layer, remat, static=4, scanned=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=length,
    )


def linear_init(config: CausalConfig) -> nn.initializers.Initializer:
    """How a family's linear layers and tables start."""
    return nn.initializers.normal(config.initializer_range)


class _Headed(nn.Module):
    """A decoder below a head. A family's class says which decoder, and its name in transformers."""

    network: ClassVar[Any]
    below: ClassVar[str]

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"

    def decoder(self) -> Any:
        """The network below the head."""
        return self.network(self.config, self.dtype, self.param_dtype, self.remat, name=self.below)


class CausalLM(_Headed):
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
    ) -> Any:
        """The logits of the token after each token.

        Args:
          input_ids: int [batch, length].
          attention_mask: [batch, length], 0 or False at padding, on either side; by default there is none.
          position_ids: int [batch, length]; by default from 0 (padding counts), or from where the cache ends.
          segment_ids: int [batch, length], for packed sequences: a token sees its own segment only, and unless
            ``position_ids`` says otherwise each segment's positions start at 0.
          cache: of `init_cache` or of the call before; the tokens of this call follow those in it.
          deterministic: no dropout; otherwise give ``rngs={"dropout": key}``.
          last_only: only the last token's logits, [batch, 1, vocab_size].

        Returns:
          float32 [batch, length, vocab_size]; with a cache, also the next one.
        """
        decoder = self.decoder()
        x, following = decoder.run(input_ids, attention_mask, position_ids, segment_ids, cache, deterministic)
        x = x[:, -1:] if last_only else x
        if self.config.tie_word_embeddings:
            logits = decoder.unembed(x)
        else:
            logits = _head(self, self.config.vocab_size, "lm_head")(x)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits if cache is None else (logits, following)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for ``length`` tokens in all, prompt included; by default in the dtype of the computation."""
        layers, heads, size = self.config.cache_shape
        empty = jnp.zeros((layers, batch, length, heads, size), dtype or self.dtype)
        return Cache(empty, empty, jnp.zeros((batch, length), bool), jnp.int32(0))


class SequenceClassifier(_Headed):
    """A decoder and a linear head, without bias, on the last token that is no padding."""

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits float32 [batch, num_labels]; the arguments are those of `CausalLM`.

        The last token is the last one that is not ``pad_token_id``, as in transformers, whatever the mask says; only
        when the configuration has none, it is the last one in the mask.
        """
        x, _ = self.decoder().run(input_ids, attention_mask, position_ids, None, None, deterministic)
        last = _last_token(input_ids, attention_mask, self.config.pad_token_id)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return _head(self, self.config.num_labels, "score")(x)


def _last_token(input_ids: jax.Array, attention_mask: jax.Array | None, pad_token_id: int | None) -> jax.Array:
    """int [batch]: the index of the last token that is no padding; 0 where all are."""
    if pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        real = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
    return jnp.argmax(jnp.where(real, jnp.arange(input_ids.shape[1]), 0), axis=1)


def _head(module: _Headed, features: int, name: str) -> nn.Dense:
    """A projection to logits: inputs in the network's dtype, sums and result in float32."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=linear_init(module.config),
        dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),  # pyright: ignore[reportArgumentType]
        name=name,
    )


def unembed(x: jax.Array, table: jax.Array, dtype: Any) -> jax.Array:
    """Logits float32 [..., vocab] of states [..., width], by the table [vocab, width] of the embedding."""
    return jnp.einsum("...d,vd->...v", x, table.astype(dtype), preferred_element_type=jnp.float32)
