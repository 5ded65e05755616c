"""`generate`: text from a language model, with a cache of keys and values, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jlora._src.engine.rows import per_row
from jlora._src.types import Array, PyTree
from jlora.files.errors import ModelError
from jlora.models._causal import Cache
from jlora.models._heads import LanguageModel


def generate(
    model: nn.Module,
    params: PyTree,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos_token_id: int | Sequence[int] | Literal["model"] | None = "model",
    pad_token_id: int | None = None,
    apply: Callable[..., Any] | None = None,
) -> Array:
    """Generate tokens after each prompt, greedily or by sampling, up to the model's end token.

    Compiles once: another call with the same model, ``apply``, shapes, ``max_new_tokens`` and number of end tokens does
    not recompile, whatever the temperature above 0, ``top_p``, key and end tokens.

    >>> apply = jlora.lora(model.apply)
    >>> tokens = generate(model, jlora.attach(params, adapters), prompts, mask, max_new_tokens=32, apply=apply)

    Args:
      model: a network for the task causal-lm, from `jlora.models.load`.
      params: its parameters; or, together with ``apply``, a tree with attached adapters, also with an adapter for each
        row (`jlora.select`).
      input_ids: int [batch, length], prompts padded on the left.
      attention_mask: [batch, length], 0 or False at padding; by default there is none.
      max_new_tokens: the maximum number of new tokens.
      temperature: 0 takes the most probable token; otherwise tokens are sampled from logits divided by it.
      top_p: sample from the most probable tokens that together have this probability (Holtzman et al. 2019).
      key: a PRNG key for sampling.
      eos_token_id: the token or tokens that end a row; None for none. By default the model's: those of the
        generation_config.json that it was loaded with, or else of its config.json.
      pad_token_id: fills a row after its end; by default the first end token, or 0.
      apply: ``model.apply``, or ``jlora.lora(model.apply)`` for attached trees.

    Returns:
      int32 [batch, max_new_tokens], without the prompts.

    Raises:
      ModelError: if the model is not a language model, or has fewer positions than the longest prompt and the new
        tokens need, not counting padding; if a prompt is empty or not padded on the left, or has a token outside the
        vocabulary; or if an option is out of range, or the key is missing. Inside ``jit``, values are not checked,
        and padding counts as tokens.
    """
    if not isinstance(model, LanguageModel):
        raise ModelError(
            f"generate: {type(model).__name__} has no logits of the next token; expected a network from "
            'jlora.models.load(..., task="causal-lm") '
        )
    input_ids = jnp.asarray(input_ids)
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    _check_options(max_new_tokens, temperature, top_p, key)
    _check_prompts(model, input_ids, mask, max_new_tokens)
    if eos_token_id == "model":
        eos_token_id = model.config.end_tokens
    ends = np.atleast_1d(np.asarray([] if eos_token_id is None else eos_token_id, np.int32))
    if pad_token_id is None:
        pad_token_id = int(ends[0]) if ends.size else 0
    sampling = None
    if temperature > 0:
        sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p))
    return _generate(
        model,
        apply or model.apply,
        max_new_tokens,
        params,
        input_ids,
        mask,
        sampling,
        jax.random.key(0) if key is None else key,
        jnp.asarray(ends),
        jnp.int32(pad_token_id),
    )


class Sampling(NamedTuple):
    """Sampling options, as float32 scalars."""

    temperature: jax.Array
    top_p: jax.Array


class _State(NamedTuple):
    """State of the loop: tokens [batch, new], their number so far, the finished rows, and the next call's inputs."""

    tokens: jax.Array
    step: jax.Array
    ended: jax.Array
    cache: Cache
    key: jax.Array


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model: LanguageModel,
    apply: Callable[..., Any],
    new: int,
    params: PyTree,
    input_ids: jax.Array,
    mask: jax.Array,
    sampling: Sampling | None,
    key: jax.Array,
    ends: jax.Array,
    pad: jax.Array,
) -> jax.Array:
    batch, length = input_ids.shape

    def call(params: PyTree, tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: Cache) -> Any:
        return apply(params, tokens, valid, positions, cache=cache, last_only=True)

    axes: Any = (1, 1, 0, None)
    rows = Cache(*axes)
    mixed = per_row(call, in_axes=(None, 0, 0, 0, rows), out_axes=(0, rows))

    def forward(tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = mixed(params, tokens, valid, positions, cache)
        return logits[:, 0], cache

    def append(state: _State, logits: jax.Array, cache: Cache) -> _State:
        key, draw = jax.random.split(state.key)
        token = jnp.argmax(logits, axis=-1) if sampling is None else _sample(draw, logits, sampling)
        token = jnp.where(state.ended, pad, token.astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        ended = state.ended | jnp.isin(token, ends)
        return _State(tokens, state.step + 1, ended, cache, key)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < new) & ~state.ended.all()

    def advance(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = prompts + state.step - 1
        return append(state, *forward(last, jnp.ones_like(last, bool), positions, state.cache))

    # Positions skip padding, whose own position has no effect.
    prompts = mask.sum(axis=1, keepdims=True)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    tokens = jnp.full((batch, new), pad, jnp.int32)
    cache = model.init_cache(batch, length + new - 1)
    start = _State(tokens, jnp.int32(0), jnp.zeros(batch, bool), cache, key)
    first = append(start, *forward(input_ids, mask, positions, cache))
    return jax.lax.while_loop(unfinished, advance, first).tokens


def _sample(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens [batch] sampled from float32 logits [batch, vocab], with temperature, then top-p."""
    logits = logits / sampling.temperature
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # Keep a token if those before it do not reach top_p; always keep the first.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    drawn = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def _check_options(new: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    """Raises a ModelError for an option out of range, or sampling without a key."""
    if new < 1:
        raise ModelError(f"generate: max_new_tokens = {new}; expected at least 1")
    if temperature < 0:
        raise ModelError(f"generate: temperature = {temperature}; expected 0 (the most probable token) or more")
    if not 0 < top_p <= 1:
        raise ModelError(f"generate: top_p = {top_p}; expected a probability above 0 and at most 1 (all tokens)")
    if temperature > 0 and key is None:
        raise ModelError(
            f"generate: temperature = {temperature} samples tokens; pass key=jax.random.key(0), or 0 to sample none"
        )


def _check_prompts(model: LanguageModel, input_ids: jax.Array, mask: jax.Array, new: int) -> None:
    """Raises a ModelError for prompts that cannot be continued; values are checked only outside ``jit``."""
    if input_ids.ndim != 2 or not input_ids.shape[1] or mask.shape != input_ids.shape:
        raise ModelError(
            f"generate: input_ids has shape {input_ids.shape} and attention_mask {mask.shape}; expected both "
            "[batch, length] with at least one token"
        )
    most, size = model.config.max_length, model.config.vocab_size
    # Padding takes no position.
    longest = input_ids.shape[1] if isinstance(mask, Tracer) else int(np.asarray(mask).sum(axis=1).max(initial=0))
    if most is not None and longest + new > most:
        raise ModelError(
            f"generate: {longest} prompt and {new} new tokens; {type(model).__name__} has {most} positions. "
            f"Expected at most {most} together: truncate the prompts on the left, or lower max_new_tokens"
        )
    if not isinstance(input_ids, Tracer) and (bad := _outside(np.asarray(input_ids), size)):
        raise ModelError(
            f"generate: input_ids holds {bad}; expected tokens from 0 to {size - 1} (vocab_size = {size}): use this "
            "model's tokenizer"
        )
    if not isinstance(mask, Tracer):
        _check_padding(np.asarray(mask))


def _check_padding(mask: np.ndarray) -> None:
    """Raises a ModelError for prompts that are empty or not padded on the left; ``mask`` is bool [batch, length]."""
    if empty := np.flatnonzero(~mask.any(axis=1)).tolist():
        raise ModelError(f"generate: the prompts {empty} are all padding; expected at least one token in each")
    if wrong := np.flatnonzero((np.diff(mask.astype(np.int8), axis=1) < 0).any(axis=1)).tolist():
        raise ModelError(
            f"generate: the prompts {wrong} have padding after a token; new tokens must follow the prompt directly. "
            'Expected padding on the left only: `tokenizer.padding_side = "left"`'
        )


def _outside(ids: np.ndarray, size: int) -> list[int]:
    """Some of the ids outside the vocabulary."""
    return np.unique(ids[(ids < 0) | (ids >= size)])[:8].tolist()
