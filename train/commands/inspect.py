"""The command that shows the weights of a checkpoint that would be adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

import jlora
from jlora import models
from jlora.files import hub_files
from train.config import ConfigError


def inspect(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    lora: jlora.LoraConfig = jlora.LoraConfig(),  # noqa: B008  (frozen)
    task: models.TaskName | None = None,
    labels: int | None = None,
    revision: str | None = None,
) -> None:
    """Show the weights of a checkpoint that would be adapted. Reads config.json only, no weights.

    Args:
      checkpoint: Folder, or id of a model on the hub.
      lora: What to adapt, and how.
      task: Task of the network. Default: the checkpoint's.
      labels: Number of classes of a classifier.
      revision: Branch, tag or commit of a model on the hub.
    """
    if (folder := Path(checkpoint)).is_dir() and not (folder / hub_files.CONFIG).is_file():
        raise ConfigError(f"{checkpoint} has no {hub_files.CONFIG}; expected the folder of a checkpoint")
    model = models.build(checkpoint, task=task, labels=labels, revision=revision)
    params = models.abstract(model)
    try:
        plan = jlora.plan(params, lora, jlora.trace(model.apply, params, models.example_inputs(model)))
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error
    print(f"{checkpoint}: {type(model).__name__}\n\n{plan}")
