"""A task and the shapes of its batches, from a configuration alone: no data and no tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.config import CausalLM, ConfigError, ImageClassification, Pretrained, SequenceClassification, TrainConfig
from train.networks.network import Network
from train.networks.pretrained import checkpoint_side, stored_dtype
from train.networks.registry import make_network
from train.tasks.base import Task
from train.tasks.registry import make_task

CLASSES = ("0", "1")
"""Stand for the labels that a configuration leaves to the data; a head of more classes costs little more."""


class StandIn(NamedTuple):
    """What a step is made of, without its data.

    Attributes:
      config: completed where it leaves something to the data.
      network, task: as the configuration says.
      batch: the shapes of the longest batch.
      notes: what was assumed.
    """

    config: TrainConfig
    network: Network
    task: Task
    batch: dict[str, jax.ShapeDtypeStruct]
    notes: list[str]


def stand_in(config: TrainConfig) -> StandIn:
    """The network and the task of a valid configuration, and the shapes of its longest batch.

    Raises:
      ConfigError: if a checkpoint cannot be used, or the size of images is only known from the data.
    """
    config, notes = _completed(config)
    network = make_network(config, tokenizer=False)
    return StandIn(config, network, make_task(config, network), _batch(config, network), notes)


def _completed(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    task, model, notes, found = config.task, config.model, [], {}
    if isinstance(task, CausalLM):
        # Which tokens carry loss does not change what is computed; a chat would need its template.
        empty = dict.fromkeys(("messages", "prompt", "completion", "tools", "system", "template"))
        found = {**empty, "text": "text", "chat": False}
    elif task.labels is None and not getattr(task, "regression", False):
        found["labels"] = CLASSES
        notes.append(f"labels: the data have them; {len(CLASSES)} classes are assumed; pass --task.labels")
    if isinstance(task, ImageClassification) and task.side is None:
        if not isinstance(model, Pretrained):
            raise ConfigError("task.side: got None, expected the size of the images; pass --task.side 28")
        found["side"] = checkpoint_side(model)
    if getattr(task, "class_weights", None) is not None:
        found["class_weights"] = None
    config = dataclasses.replace(config, task=dataclasses.replace(task, **found))
    if isinstance(model, Pretrained) and model.param_dtype is None:
        dtype: Any = stored_dtype(model)
        config = dataclasses.replace(config, model=dataclasses.replace(model, param_dtype=dtype))
        notes.append(f"model.param_dtype: {dtype}, as config.json has it")
    return config, notes


def _batch(config: TrainConfig, network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns that `Task.encode` makes, for the configured rows of the greatest length."""
    task, rows = config.task, config.fit.batch_size
    if isinstance(task, ImageClassification):
        image = (rows, task.side, task.side, network.channels)
        return {"image": jax.ShapeDtypeStruct(image, jnp.float32), "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    tokens = jax.ShapeDtypeStruct((rows, max((*(config.data.buckets or ()), task.max_length))), jnp.int32)
    names = ["input_ids", "attention_mask"]
    if isinstance(task, CausalLM):
        names += ["loss_mask", "segment_ids"] if task.pack else ["loss_mask"]
        return dict.fromkeys(names, tokens)
    assert isinstance(task, SequenceClassification)
    if getattr(getattr(network.model, "config", None), "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    label = jax.ShapeDtypeStruct((rows,), jnp.float32 if task.regression else jnp.int32)
    return {**dict.fromkeys(names, tokens), "label": label}
