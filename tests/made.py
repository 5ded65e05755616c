"""Finished runs without a training: a configuration's network with random adapters, for tests of what uses a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.models import example_inputs
from train.config import DataConfig, Pretrained, TrainConfig
from train.networks.registry import make_network
from train.rundir import finished
from train.tasks.registry import make_task


def made_run(checkpoint: Path, cache_dir: Path, task: Any, **model: Any) -> finished.FinishedRun:
    """A run of ``task`` on a checkpoint."""
    lora = jlora.LoraConfig(rank=2, alpha=4)
    config = TrainConfig("made", task, Pretrained(str(checkpoint), **model), DataConfig("x"), lora, cache_dir=cache_dir)
    network = make_network(config)
    assert network.load is not None and network.model is not None
    params = network.load(jax.random.key(0), None)
    uses = jlora.trace(network.model.apply, params, example_inputs(network.model))
    fresh = jlora.init(jax.random.key(1), params, config.lora, uses)
    leaves, treedef = jax.tree.flatten(fresh)
    adapters = [jax.random.normal(jax.random.key(i), x.shape, x.dtype) * 0.3 for i, x in enumerate(leaves)]
    return finished.FinishedRun(
        Path("made"), config, network, make_task(config, network), params, treedef.unflatten(adapters)
    )
