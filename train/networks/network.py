"""A network as functions of its parameters: its interface to the rest of the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

import jlora
from train.config import (
    ConfigError,
)
from train.data.ragged import Examples

Inputs = Mapping[str, jax.Array]
Forward = Callable[..., Any]
"""``forward(params, inputs, key=None)``: the outputs, which only the task reads; a key turns on the network's own
dropout."""


@dataclass(frozen=True)
class Network:
    """A network with its initializer, sharding rules and tokenizer.

    Attributes:
      forward: see `Forward`; inputs are a dictionary of arrays.
      init: ``init(key)``: random parameters.
      rules: sharding rules for a mesh with the axes data, fsdp and tensor; see `jlora.shardings`.
      load: ``load(key, shardings)``: the checkpoint's parameters, at these shardings, or on one device for None. A head
        that the checkpoint lacks is drawn from the key; without a key it is an error. None for a network from scratch.
      model: the module of `jlora.models`, or None.
      tokenizer: from transformers, set up for the task; None for images.
      channels, mean, std: of the images, as the network expects them.
      source: the checkpoint, or None.
      scheme: of its quantized weights, or None.
    """

    forward: Forward
    init: Callable[[jax.Array], Any]
    rules: jlora.ShardingRules
    load: Callable[[jax.Array | None, Any], Any] | None = None
    model: nn.Module | None = None
    tokenizer: Any = None
    channels: int = 1
    mean: Any = 0.0
    std: Any = 1.0
    source: str | None = None
    scheme: str | None = None


def check_tokens(network: Network, *sets: Mapping[str, Examples]) -> None:
    """Raises a ConfigError if the examples contain tokens beyond the network's vocabulary."""
    known = getattr(getattr(network.model, "config", None), "vocab_size", None)
    if known is None or network.tokenizer is None:
        return
    columns: list[Any] = [examples["input_ids"] for named in sets for examples in named.values()]
    largest = max((tokens.largest for tokens in columns), default=0)
    if largest >= known:
        word = network.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"model.path: the tokenizer has the token {largest} ({word!r}), but the network of {network.source} "
            f"has {known} tokens; expected the tokenizer that belongs to the weights"
        )
