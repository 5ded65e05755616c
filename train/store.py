"""Files: array trees (orbax), JSON, and the run directory.

    runs/digits-lora-seed0-20261122-120000/
      config.json      the whole configuration, defaults and overrides included
      metrics.jsonl    a line for each epoch of each training
      adapters/        all that was trained (orbax): factors a and b, or whole leaves, by path
      adapters.json    what is recorded with the factors: scale, axes, dropout
      merged/          plain parameters for the unmodified model (orbax)
      curves.png       when matplotlib is installed
      summary.json     the figures

The summary is written last: a run directory without one is unfinished.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora import LoraFactors
from train.config import TrainConfig


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of arrays to a new directory ``path``; it appears whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)


def load_tree(path: Path, like: Any) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of ``like`` (arrays or shape structs)."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.resolve(), target)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that ``path`` holds all of it or what it held before."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(draft, path)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append ``record`` as a line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def save_adapters(run_dir: Path, adapters: dict[str, Any]) -> None:
    """Write adapters as ``adapters/`` and, beside their arrays, what is recorded with them as ``adapters.json``."""
    save_tree(run_dir / "adapters", arrays_of(adapters))
    recorded = {
        path: {"scale": adapter.scale, "axes": adapter.axes._asdict(), "dropout": adapter.dropout}
        for path, adapter in adapters.items()
        if isinstance(adapter, LoraFactors)
    }
    write_json(run_dir / "adapters.json", recorded)


def arrays_of(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters as they are stored: whole leaves as they are, factors as a dict of the arrays that they have."""
    return {
        path: {name: array for name, array in vars(adapter).items() if isinstance(array, jax.Array)}
        if isinstance(adapter, LoraFactors)
        else adapter
        for path, adapter in adapters.items()
    }


def make_run_dir(config: TrainConfig) -> Path:
    """The directory of this run, made anew, with ``config.json`` in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = config.run_dir or Path("runs") / f"{config.name}-{config.mode}-seed{config.seed}-{stamp}"
    run_dir.mkdir(parents=True, exist_ok=config.run_dir is not None)
    write_json(run_dir / "config.json", dataclasses.asdict(config))
    return run_dir
