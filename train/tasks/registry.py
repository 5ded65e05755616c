"""A configuration in, its task out (`train.tasks.base.Task`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import CausalLM, ConfigError, Pretrained, SequenceClassification, TrainConfig
from train.data.lines import decode
from train.data.tables import Table
from train.networks.network import Network
from train.networks.pretrained import checkpoint_side
from train.tasks.base import Measured, Task
from train.tasks.classify import TextClassification, TextRegression
from train.tasks.images import Images, first_side
from train.tasks.labels import class_counts, class_names, class_numbers, class_weights
from train.tasks.language import LanguageModel

__all__ = ["Measured", "Task", "make_task", "resolved"]


def resolved(config: TrainConfig, tables: Mapping[str, Table]) -> TrainConfig:
    """The configuration with its task completed from the data: labels, class weights, the size of images."""
    task, train = config.task, tables["train"]
    found: dict[str, Any] = {}
    if isinstance(task, CausalLM):
        if task.template is not None and "{" not in task.template:
            found["template"] = _template(task.template)
        return dataclasses.replace(config, task=dataclasses.replace(task, **found))
    if not getattr(task, "regression", False):
        found["labels"] = labels = task.labels or class_names(train, task.label)
        if task.class_weights is not None:
            counts = class_counts(class_numbers(train, task.label, labels), labels)
            found["class_weights"] = class_weights(task.class_weights, counts)
    if not isinstance(task, SequenceClassification) and task.side is None:
        known = checkpoint_side(config.model) if isinstance(config.model, Pretrained) else None
        found["side"] = known or first_side(train, task.image)
    return dataclasses.replace(config, task=dataclasses.replace(task, **found))


def _template(name: str) -> str:
    """The chat template from a file."""
    if not (path := Path(name)).is_file():
        raise ConfigError(f"task.template: no file at {name}; expected a file, or a template (Jinja)")
    return decode(path.read_bytes(), name)


def make_task(config: TrainConfig, network: Network) -> Task:
    """The task of a `resolved` configuration, for its network."""
    match config.task:
        case SequenceClassification(regression=True) as task:
            return TextRegression(task, (), network.tokenizer)
        case SequenceClassification(labels=labels) as task:
            return TextClassification(task, labels or (), network.tokenizer)
        case CausalLM() as task:
            return LanguageModel(task, network.tokenizer)
        case task:
            return Images(task, task.labels or (), network.channels, network.mean, network.std)
