"""A finished run, opened again: its network with what it learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jlora
from jlora.files.json_files import read_json
from jlora.models import TensorError
from train.compute.keys import random_key
from train.config import ConfigError, TrainConfig
from train.networks.network import Network
from train.networks.registry import make_network
from train.pretrain import cached_at, identity, load_params
from train.rundir import files
from train.rundir.directory import read_summary
from train.tasks.base import Task
from train.tasks.registry import make_task


@dataclass(frozen=True)
class FinishedRun:
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


def open_run(folder: Path) -> FinishedRun:
    """The run in ``folder``.

    Raises:
      ConfigError: if there is none, it is unfinished, a file of it is damaged or was changed, or its base is gone.
    """
    if not (folder / "config.json").is_file():
        found = sorted(str(file.parent) for file in folder.parent.glob("*/summary.json"))
        raise ConfigError(
            f"{folder} is no run directory: it has no config.json"
            + (f"; beside it there are {', '.join(found)}" if found else "; python -m train makes one below runs/")
        )
    try:
        written = read_json(folder / "config.json")
    except TensorError as error:
        raise ConfigError(str(error)) from error
    if written.get("kind") != TrainConfig.__name__:
        raise ConfigError(f"{folder} is no run directory: its config.json is of something else, such as a checkpoint")
    if not (folder / "summary.json").is_file():
        raise ConfigError(
            f"{folder} has no summary.json: the run did not finish. Start it again with the same command, or with "
            f"--run-dir {folder}, and it goes on"
        )
    summary = read_summary(folder)
    config = read_config(folder / "config.json", written)
    network = make_network(config)
    try:
        adapters = jlora.load(folder / "adapters")
    except TensorError as error:
        raise ConfigError(str(error)) from error
    return FinishedRun(
        folder, config, network, make_task(config, network), _params(folder, config, network, summary), adapters
    )


def read_config(file: Path, written: dict[str, Any]) -> TrainConfig:
    """The configuration in a run's ``file``, which holds ``written``.

    Raises:
      ConfigError: naming the field of which it is none of this version.
    """
    try:
        config = files.from_json(TrainConfig, written)
        config.check()
    except ValueError as error:
        raise ConfigError(f"{file} is no configuration of this version: {error}") from error
    return config


def _params(folder: Path, config: TrainConfig, network: Network, summary: dict[str, Any]) -> Any:
    if network.load is not None:
        return network.load(random_key(config.seed, "head"), None)
    recorded = Path(summary["base"]["path"])
    for path in (recorded, cached_at(config, identity(config))):
        if (path / "params").is_dir():
            return load_params(path, network)
    raise ConfigError(f"{folder}: its base, {recorded}, is gone. Train it again with `python -m train`")
