"""Checkpoints of a training: what it goes on from after it was stopped, on the same devices or on others.

    checkpoints/120/
      adapters/     what is trained, never the base
      opt_state/    of the optimizer
      rng/          the key from which dropout is drawn
      position/     JSON: step, sums of metrics, best figure; the same on any number of devices
      factors/      JSON: scale, axes and rate of each adapter
      config/       JSON: the run's configuration
      SHA256SUMS    of all files of these

orbax writes them beside the training, in the background; one that was not finished does not count, and one of which a
bit changed since is refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.files.adapters import differences, record_of
from jlora.files.checksums import check_sums, files_in, write_sums
from jlora.messages import one_line
from jlora.models import TensorError
from train.compute.layouts import Layout
from train.compute.step import TrainState
from train.config import SaveConfig
from train.loop.progress import Position

ITEMS = ("adapters", "opt_state", "rng", "position", "factors", "config")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says which, why, and which others there are."""


class Checkpoints:
    """The checkpoints in a folder; as many as the configuration says are kept, and the best one if that is wanted.

    All processes call each method.
    """

    def __init__(self, folder: Path, config: SaveConfig, *, keep_best: bool):
        self.folder = folder
        self._policy = _Policy(config.max_to_keep, keep_best)
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it then raises
        try:
            self._manager = ocp.CheckpointManager(
                folder.resolve(),
                item_names=ITEMS,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                ),
            )
        except Exception as error:  # orbax and tensorstore have no common class for what a disk may do
            raise CheckpointError(
                f"{folder}: no checkpoints can be kept here ({one_line(error)}); expected a directory that is writable"
            ) from error

    def steps(self) -> list[int]:
        """The steps of which there are whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def position(self, step: int) -> Position:
        """Where the training was.

        Raises:
          CheckpointError: if that cannot be read.
        """

        def read() -> Position:
            items = {name: ocp.args.JsonRestore() for name in ("position", "config")}
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            position = Position.from_json(found["position"])
            # Those of earlier versions do not tell how many epochs were planned; their configuration does.
            position.planned = position.planned or [[0, found["config"]["fit"]["epochs"]]]
            return position

        return self._guarded(step, read)

    def restore(self, step: int, layout: Layout, like: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        """The state and the key.

        Args:
          like: a state that lies where the restored one shall lie.
          key: of the kind that was saved.

        Raises:
          CheckpointError: if it cannot be read, or is of other adapters.
        """

        target = jax.tree.map(_target, layout.to_disk(like))

        def read() -> Any:
            found = self._manager.restore(step, args=ocp.args.Composite(factors=ocp.args.JsonRestore()))
            expected = {path: record_of(value) for path, value in target.adapters.items()}
            if wrong := differences(found["factors"], expected):
                raise ValueError(f"it holds other adapters: {'; '.join(wrong)}")
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    adapters=ocp.args.StandardRestore(target.adapters),
                    opt_state=ocp.args.StandardRestore(target.opt_state),
                    rng=ocp.args.StandardRestore(_key_data(key)),
                ),
            )

        found = self._guarded(step, read)
        count: Any = np.asarray(step, target.step.dtype)
        if isinstance(target.step, jax.ShapeDtypeStruct):
            count = jax.device_put(count, target.step.sharding)
        state = TrainState(count, found["adapters"], found["opt_state"])
        return layout.from_disk(state), jax.random.wrap_key_data(found["rng"]["key"])

    def save(self, layout: Layout, state: TrainState, position: Position, key: jax.Array, config: Any) -> None:
        """Write a checkpoint in the background; the state may be changed when this returns.

        Raises:
          CheckpointError: if this one, or the one before, could not be written.
        """
        self._policy.best_step = position.best_step
        kept = layout.to_disk(state)
        factors = {path: record_of(value) for path, value in kept.adapters.items()}

        def write() -> None:
            self._manager.save(
                position.step,
                args=ocp.args.Composite(
                    adapters=ocp.args.StandardSave(kept.adapters),
                    opt_state=ocp.args.StandardSave(kept.opt_state),
                    rng=ocp.args.StandardSave(_key_data(key)),
                    position=ocp.args.JsonSave(position.to_json()),
                    factors=ocp.args.JsonSave(factors),
                    config=ocp.args.JsonSave(config),
                ),
            )

        self._writing(write)

    def wait(self) -> None:
        """Return when all that was saved is on disk; raises as `save`."""
        self._writing(self._manager.wait_until_finished)

    def delete_after(self, step: int) -> None:
        """Give up the checkpoints of later steps."""
        for later in [one for one in self.steps() if one > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Let go of the folder; what could not be written was told when it was saved, or waited for."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def _seal(self) -> None:
        """Keep the sums of a checkpoint's files; orbax calls this, in the first process, before it calls it whole."""
        for draft in self.folder.glob("*.orbax-checkpoint-tmp*"):
            # What lies beside the items is orbax's, which writes it once more.
            write_sums(draft, {name: file for name, file in files_in(draft).items() if "/" in name})

    def _writing(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # as above
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({one_line(error)}). {_usable(self._whole())} Make "
                "room or give the right to write, and run the same command again: it goes on from the newest"
            ) from error

    def _guarded(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            check_sums(self.folder / str(step))  # before orbax, which prints beside what it raises
            return read()
        except Exception as error:  # as above
            reason = f": {error}\n" if isinstance(error, TensorError) else f" ({one_line(error)}). "
            others = [one for one in self.steps() if one != step]
            older = [one for one in others if one < step]
            advice = f"pass --resume {max(older)} to go on from there" if older else "pass another --run-dir"
            raise CheckpointError(
                f"{self.folder / str(step)}: the checkpoint cannot be read{reason}{_usable(others)} Nothing was "
                f"changed; {advice}"
            ) from error

    def _whole(self) -> Sequence[int]:
        try:
            return self._manager.all_steps(read=True)
        except OSError:
            return self.steps()


class _Policy:
    """The newest ones are kept, and the best one. It goes by the position, so that of equal figures the first is it."""

    def __init__(self, newest: int, keep_best: bool):
        self._newest, self._keep_best = newest, keep_best
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        last = len(checkpoints) - self._newest
        return [i >= last or self._keep_best and one.step == self.best_step for i, one in enumerate(checkpoints)]


def _target(x: Any) -> Any:
    """What orbax is to restore: an array of the same shape at the same place, or numbers on the host."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


def _key_data(key: jax.Array) -> dict[str, np.ndarray]:
    return {"key": np.asarray(jax.random.key_data(key))}


def _usable(steps: Sequence[int]) -> str:
    return f"Usable: {', '.join(f'step {step}' for step in steps)}." if steps else "There is no other."
