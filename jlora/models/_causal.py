"""Shared parts of the decoders: the causal mask, the cache of keys and values, and the stack of layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.fields import fits
from jlora.files.errors import ModelError
from jlora.files.hub_files import CONFIG, GENERATION_CONFIG
from jlora.messages import shown
from jlora.models._family import ModelConfig, NonNegative, Positive, Size, Token, check_length
from jlora.models._layers import Network, Remat, recomputed
from jlora.models.attention.mask import AttentionForm, Mask, make_mask


@dataclasses.dataclass(frozen=True)
class CausalConfig(ModelConfig):
    """The fields of a decoder's configuration that the heads use.

    Attributes:
      vocab_size: the number of tokens.
      initializer_range: the standard deviation of new weights.
      tie_word_embeddings: the token embedding is also the output projection.
      final_logit_softcapping: None, or the bound c of ``c * tanh(logits / c)``.
      pad_token_id: the padding token, which a classifier skips to find the last token.
    """

    vocab_size: Size = dataclasses.field(kw_only=True)
    initializer_range: NonNegative = dataclasses.field(default=0.02, kw_only=True)
    tie_word_embeddings: bool = dataclasses.field(default=True, kw_only=True)
    final_logit_softcapping: Positive | None = dataclasses.field(default=None, kw_only=True)
    pad_token_id: Token | None = dataclasses.field(default=None, kw_only=True)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """The numbers of layers and of key heads, and the size of a head."""
        raise NotImplementedError

    @property
    def max_length(self) -> int | None:
        """The number of positions, or None if it is unlimited."""
        return None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a sequence, from generation_config.json, or else config.json; possibly none.

        Raises:
          ModelError: if the ``eos_token_id`` there is neither a token nor a list of tokens.
        """
        for file, text in ((GENERATION_CONFIG, self.generation), (CONFIG, self.hf)):
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
    """The keys and values of the tokens so far. Immutable: a call returns the next one.

    Attributes:
      keys, values: [layers, batch, slots, key heads, head size].
      valid: bool [batch, slots], which slots hold a token that is not padding.
      length: int32 scalar, the number of slots in use.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    length: jax.Array


class LayerInput(NamedTuple):
    """The per-layer inputs besides the parameters: each field has a leading axis of layers, or is None.

    Attributes:
      keys, values: of the cache.
      window: int32, which of the mask's windows the layer has.
      scale: float32, multiplies the scores.
    """

    keys: jax.Array | None
    values: jax.Array | None
    window: jax.Array | None
    scale: jax.Array | None


def causal_mask(
    like: jax.Array,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    windows: Sequence[int | None],
    form: AttentionForm,
) -> tuple[Mask, jax.Array | None]:
    """The mask of a call, and the next cache's ``valid``, or None without a cache.

    Args:
      like: the tokens, [batch, length].
      attention_mask: [batch, length], 0 or False at padding; None if there is none.
      segment_ids: int [batch, length], for packed sequences.
      cache: of the previous tokens.
      windows: of the layers.

    Raises:
      ValueError: for segments together with a cache, or a cache with fewer slots than there are tokens.
    """
    length = like.shape[1]
    real = None if attention_mask is None else attention_mask.astype(bool)
    slots, start, valid = length, None, None
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids together with a cache; packed sequences are for training; pass one of the two")
    if cache is not None:
        slots, start = cache.valid.shape[1], cache.length
        if slots < length:
            raise ValueError(f"{length} tokens for a cache of {slots} slots; make it with init_cache for all")
        new = jnp.ones(like.shape, bool) if real is None else real
        real = valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, new, start, axis=1)
    options: Any = {"real": real, "segments": segment_ids, "start": start, "windows": distinct(windows)}
    return make_mask(like, length, slots, causal=True, form=form, **options), valid


def distinct(windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """Each window once."""
    return tuple(dict.fromkeys(windows))


def default_positions(shape: tuple[int, ...], segment_ids: jax.Array | None, cache: Cache | None) -> jax.Array:
    """int [1 or batch, length], from 0 or from the end of the cache; each segment starts at 0. Padding is counted."""
    index = jnp.arange(shape[1])[None]
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index if cache is None else index + cache.length


def layer_inputs(cache: Cache | None, *, window: jax.Array | None = None, scale: jax.Array | None = None) -> LayerInput:
    """The input of the layers, from the cache and their windows or scales."""
    return LayerInput(None, None, window, scale) if cache is None else LayerInput(*cache[:2], window, scale)


def next_cache(cache: Cache | None, slots: Any, valid: jax.Array | None, length: int) -> Cache | None:
    """The cache after a call with ``length`` tokens whose layers returned ``slots``, (keys, values)."""
    if cache is None or valid is None:
        return None
    keys, values = slots
    return Cache(keys, values, valid, cache.length + length)


def with_cached(
    layer: LayerInput, key: jax.Array, value: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The keys and values that a layer attends to: the cache's, if any, and this call's."""
    if layer.keys is None or layer.values is None or start is None:
        return key, value
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    return write(layer.keys, key.astype(layer.keys.dtype)), write(layer.values, value.astype(layer.values.dtype))


def scanned_layers(layer: type[nn.Module], length: int, *, remat: Remat) -> Any:
    """``layer`` scanned over stacked parameters: ``(x, LayerInput, shared, deterministic) -> (x, (keys, values))``."""
    return nn.scan(
        recomputed(layer, remat, static=4, scanned=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=length,
    )


def linear_init(config: CausalConfig) -> nn.initializers.Initializer:
    """The initializer of linear layers and tables."""
    return nn.initializers.normal(config.initializer_range)


class LayerStack(Network):
    """A decoder without a head. Subclasses define ``setup`` and the last three methods."""

    title: ClassVar[str]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The number of tokens that each layer attends to, the current one included; None for all."""
        return (None,)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The last layer's states [batch, length, width], normalized; the arguments are those of `LanguageModel`."""
        return self.run(input_ids, attention_mask, position_ids, segment_ids, None, deterministic)[0]

    def run(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        position_ids: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Cache | None]:
        """The states, as from `__call__`, and the next cache, if any.

        Raises:
          ModelError: if there are more tokens than positions, and no ``position_ids``; also for packed sequences, whose
            lengths are not known at compile time.
        """
        if position_ids is None:
            check_length(self.title, input_ids.shape[1], self.config.max_length)
            position_ids = default_positions(input_ids.shape, segment_ids, cache)
        mask, valid = causal_mask(input_ids, attention_mask, segment_ids, cache, self.windows, self.attention)
        x = self.embed(input_ids, position_ids, deterministic)
        x, slots = self.apply_layers(x, position_ids, mask, cache, deterministic)
        return x, next_cache(cache, slots, valid, input_ids.shape[1])

    def embed(self, input_ids: jax.Array, position_ids: jax.Array, deterministic: bool) -> jax.Array:
        """The input of the first layer, [batch, length, width]."""
        raise NotImplementedError

    def apply_layers(
        self, x: jax.Array, position_ids: jax.Array, mask: Mask, cache: Cache | None, deterministic: bool
    ) -> tuple[jax.Array, Any]:
        """The normalized states after all layers, and their (keys, values) for the next cache."""
        raise NotImplementedError

    def token_table(self) -> jax.Array:
        """The table of the token embedding, [vocab_size, width]."""
        raise NotImplementedError
