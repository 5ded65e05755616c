"""The command that shows what of a checkpoint would be adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

import jlora
from jlora import models
from jlora.files import hub_files
from train.config import ConfigError


def inspect(
    checkpoint: Annotated[str, tyro.conf.Positional],
    lora: jlora.LoraConfig = jlora.LoraConfig(),  # noqa: B008  (frozen)
    task: models.TaskName | None = None,
    labels: int | None = None,
    revision: str | None = None,
) -> None:
    """Show what of a checkpoint would be adapted, from its config.json alone.

    Args:
      checkpoint: a folder, or the id of a model on the hub.
      lora: what would be adapted, and how.
      task: what the network ends in; by default that of the checkpoint.
      labels: of a classifier, how many.
      revision: of a model on the hub.
    """
    if (folder := Path(checkpoint)).is_dir() and not (folder / hub_files.CONFIG).is_file():
        raise ConfigError(f"inspect: {checkpoint} has no {hub_files.CONFIG}; expected the folder of a checkpoint")
    model = models.build(checkpoint, task=task, labels=labels, revision=revision)
    params = models.abstract(model)
    try:
        plan = jlora.plan(params, lora, jlora.trace(model.apply, params, models.example_inputs(model)))
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error
    print(f"{checkpoint}: {type(model).__name__}\n\n{plan}")
