"""Trees of arrays on disk, written and read by orbax in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora.files.buckets import absolute


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of this process's arrays to ``path``, replacing an existing one, atomically."""
    with _checkpointer() as checkpointer:
        checkpointer.save(absolute(path), tree, force=True)


def load_tree(path: Path, like: Any, shardings: Any = None) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of ``like`` (arrays or shape structs).

    ``shardings`` is a tree like it; None puts all arrays on one device of this process.
    """
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, like)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    with _checkpointer() as checkpointer:
        return checkpointer.restore(absolute(path), target)


def _checkpointer() -> ocp.StandardCheckpointer:
    """An orbax checkpointer that does not wait for other processes."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)
