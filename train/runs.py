"""A finished run, opened again: its network with what it learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jlora
from jlora.models import TensorError
from train import store
from train.base import cached_at, identity, load_params
from train.config import ConfigError, TrainConfig
from train.keys import random_key
from train.networks import Network, make_network
from train.tasks import Task, make_task


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      folder: where it was written.
      config: of the run, completed with what it took from its data.
      network, task: as the configuration says.
      params: of the base.
      adapters: that were kept.
    """

    folder: Path
    config: TrainConfig
    network: Network
    task: Task
    params: Any
    adapters: dict[str, Any]

    @property
    def tree(self) -> Any:
        """The base with the adapters attached, for functions that `jlora.lora` has wrapped."""
        return jlora.attach(self.params, self.adapters)


def open_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
      ConfigError: if there is none, it is unfinished, or its base is gone.
    """
    if not (folder / "config.json").is_file():
        found = sorted(str(file.parent) for file in folder.parent.glob("*/summary.json"))
        raise ConfigError(
            f"{folder} is no run directory: it has no config.json"
            + (f"; beside it there are {', '.join(found)}" if found else "; python -m train makes one below runs/")
        )
    try:
        written = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(written, dict) or written.get("kind") != TrainConfig.__name__:
        raise ConfigError(f"{folder} is no run directory: its config.json is of something else, such as a checkpoint")
    if not (folder / "summary.json").is_file():
        raise ConfigError(
            f"{folder} has no summary.json: the run did not finish. Start it again with the same command, or with "
            f"--run-dir {folder}, and it goes on"
        )
    try:
        config = store.from_json(TrainConfig, written)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}/config.json is no configuration of this version ({type(error).__name__}: {error})"
        ) from error
    network = make_network(config)
    try:
        adapters = jlora.load(folder / "adapters")
    except TensorError as error:
        raise ConfigError(str(error)) from error
    return Run(folder, config, network, make_task(config, network), _params(folder, config, network), adapters)


def _params(folder: Path, config: TrainConfig, network: Network) -> Any:
    if network.load is not None:
        return network.load(random_key(config.seed, "head"), None)
    recorded = Path(json.loads((folder / "summary.json").read_text())["base"]["path"])
    for path in (recorded, cached_at(config, identity(config))):
        if (path / "params").is_dir():
            return load_params(path, network)
    raise ConfigError(f"{folder}: its base, {recorded}, is gone. Train it again with `python -m train`")
