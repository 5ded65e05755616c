"""A finished run, opened for use: its network with the trained adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.files.buckets import errors_of
from jlora.files.errors import TensorError
from train.compute.keys import random_key
from train.config import CausalLM, ConfigError, Pretrained, TrainConfig
from train.networks.network import Network
from train.networks.registry import make_network
from train.rundir.bases import load_base
from train.rundir.directory import RunDirectory
from train.tasks.base import Task
from train.tasks.registry import make_task


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
      folder: the run directory.
      config: the run's, with the values taken from its data.
      network, task: those of the configuration.
      params: the base's parameters.
      adapters: the kept adapters.
    """

    folder: Path
    config: TrainConfig
    network: Network
    task: Task
    params: Any
    adapters: dict[str, Any]

    @property
    def tree(self) -> Any:
        """The base with the adapters attached, for functions wrapped by `jlora.lora`."""
        return jlora.attach(self.params, self.adapters)


def open_run(folder: Path, other: FinishedRun | None = None) -> FinishedRun:
    """The finished run in ``folder``.

    Args:
      other: a run whose parameters are taken if both are of one checkpoint, without a new head.

    Raises:
      ConfigError: if there is none, the run is unfinished, or one of its files is damaged, changed or missing.
    """
    directory = RunDirectory(folder)
    folder = directory.path
    with errors_of(folder):
        config = directory.read_config()
    if not directory.is_finished:
        raise ConfigError(
            f"{folder} has no {directory.summary.name}: the run did not finish. Resume it with the same command, or "
            f"with --run-dir {folder}"
        )
    directory.check_sums()
    network = make_network(config)
    try:
        adapters = jlora.load(directory.adapters)
    except TensorError as error:
        raise ConfigError(str(error)) from error
    if other is not None and _is_one_checkpoint(config, other.config):
        params = other.params
    else:
        params = _params(directory, config, network)
    return FinishedRun(folder, config, network, make_task(config, network), params, adapters)


def _is_one_checkpoint(one: TrainConfig, other: TrainConfig) -> bool:
    if not all(isinstance(config.task, CausalLM) for config in (one, other)):
        return False
    return isinstance(one.model, Pretrained) and (one.model, one.base) == (other.model, other.base)


def _params(directory: RunDirectory, config: TrainConfig, network: Network) -> Any:
    if network.load is not None:
        return network.load(random_key(config.seed, "head"), None)
    # Runs of earlier versions have their base in the cache only.
    cached = Path(directory.read_summary()["base"]["path"])
    path = cached if cached.is_dir() and not directory.base.is_dir() else directory.base
    return load_base(path, jax.eval_shape(network.init, jax.random.key(0)))
