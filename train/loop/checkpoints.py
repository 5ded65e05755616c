"""Training checkpoints, to resume on the same or other devices.

    checkpoints/120/
      adapters/     the trained parameters, never the base
      opt_state/    the optimizer's state
      rng/          the key from which dropout keys are folded
      loop/         JSON: step, averages, best metric; the same on any number of devices
      factors/      JSON: scale, axes and rate of each adapter
      config/       JSON: the run's configuration
      SHA256SUMS    of all these files

orbax writes them in the background, while training continues. Unfinished checkpoints are ignored, and one with a
flipped bit is an error. In a bucket, each has the file `COMMITTED`, written last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.files.adapters import differences, record_of
from jlora.files.buckets import absolute, is_in_bucket
from jlora.files.checksums import check_sums, files_in, write_sums
from jlora.messages import one_line
from jlora.models import TensorError
from train.compute.layouts import Layout
from train.compute.processes import first_decides, wait_for_all
from train.compute.step import TrainState
from train.config import SaveConfig
from train.loop.state import LoopState

COMMITTED = "commit_success.txt"
"""The file by which orbax marks a checkpoint in a bucket as finished."""

ITEMS = ("adapters", "opt_state", "rng", "loop", "factors", "config")


class SavedState(Protocol):
    """A loop's state: `LoopState`, or that of several trainings."""

    @property
    def step(self) -> int: ...

    @property
    def best_step(self) -> int | None: ...

    def to_json(self) -> dict[str, Any]: ...


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message gives the reason and lists the usable ones."""


class Checkpoints:
    """The checkpoints in a folder: the newest ones, up to the configured number, and optionally the best one.

    Opened for reading; `begin` opens them for writing. All processes call each method.
    """

    def __init__(
        self,
        folder: Path,
        config: SaveConfig,
        *,
        keep_best: bool,
        read_state: Callable[[Any], Any] = LoopState.from_json,
    ):
        """Open a folder.

        Args:
          read_state: the loop's state from its JSON.
        """
        self.folder, self._read_state = folder, read_state
        self._policy = _Policy(config.max_to_keep, keep_best)
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs errors before raising them
        # By now, the first process may have created the folder in `begin`.
        self._manager = self._open(read_only=True) if first_decides(folder.is_dir) else None

    def _open(self, *, read_only: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            async_options=None if read_only else ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            return ocp.CheckpointManager(absolute(self.folder), item_names=ITEMS, options=options)
        except Exception as error:  # orbax and tensorstore have no common class for I/O errors
            raise CheckpointError(
                f"{self.folder}: checkpoints cannot be stored here ({one_line(error)}); expected a writable directory"
            ) from error

    def begin(self, step: int) -> None:
        """Open the folder to write checkpoints after ``step``, and delete later and unfinished ones.

        Raises:
          CheckpointError: if it cannot be written.
        """
        self.close()
        self._manager = self._open(read_only=False)
        wait_for_all("listed")  # a process that missed a deleted one would not delete it with the others
        for later in [one for one in self.steps() if one > step]:
            if is_in_bucket(self.folder):  # where a killed process may leave a part of it
                (self.folder / str(later) / COMMITTED).unlink(missing_ok=True)
            self._manager.delete(later)

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, in order."""
        return sorted(self._manager.all_steps()) if self._manager is not None else []

    def loop_state(self, step: int) -> Any:
        """The loop's state in a checkpoint.

        Raises:
          CheckpointError: if it cannot be read.
        """

        def read() -> Any:
            return self._read_state(self._restore(step, loop=ocp.args.JsonRestore())["loop"])

        return self._guarded(step, read)

    def restore(self, step: int, layout: Layout, like: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        """Restore the training state and the key.

        Args:
          like: a state with the shapes, dtypes and shardings to restore.
          key: of the same type as the saved one.

        Raises:
          CheckpointError: if they cannot be read, or belong to other adapters.
        """
        target = jax.tree.map(_target, layout.to_disk(like))

        def read() -> Any:
            found = self._restore(step, factors=ocp.args.JsonRestore())
            expected = {path: record_of(value) for path, value in target.adapters.items()}
            if wrong := differences(found["factors"], expected):
                raise ValueError(f"it holds other adapters: {'; '.join(wrong)}")
            return self._restore(
                step,
                adapters=ocp.args.StandardRestore(target.adapters),
                opt_state=ocp.args.StandardRestore(target.opt_state),
                rng=ocp.args.StandardRestore(_key_data(key)),
            )

        found = self._guarded(step, read)
        count: Any = np.full(target.step.shape, step, target.step.dtype)  # of one training, or of each of several
        if isinstance(target.step, jax.ShapeDtypeStruct):
            count = jax.device_put(count, target.step.sharding)
        state = TrainState(count, found["adapters"], found["opt_state"])
        return layout.from_disk(state), jax.random.wrap_key_data(found["rng"]["key"])

    def save(self, layout: Layout, state: TrainState, loop: SavedState, key: jax.Array, config: Any) -> None:
        """Write a checkpoint in the background; the state may be donated when this returns.

        Raises:
          CheckpointError: if this or the previous one could not be written.
        """
        self._policy.best_step = loop.best_step
        kept = layout.to_disk(state)
        items = ocp.args.Composite(
            adapters=ocp.args.StandardSave(kept.adapters),
            opt_state=ocp.args.StandardSave(kept.opt_state),
            rng=ocp.args.StandardSave(_key_data(key)),
            loop=ocp.args.JsonSave(loop.to_json()),
            factors=ocp.args.JsonSave({path: record_of(value) for path, value in kept.adapters.items()}),
            config=ocp.args.JsonSave(config),
        )
        self._writing(lambda manager: manager.save(loop.step, args=items))

    def wait(self) -> None:
        """Wait until all saved checkpoints are on disk; raises as `save`."""
        self._writing(lambda manager: manager.wait_until_finished())

    def close(self) -> None:
        """Close the folder. Write errors are raised by `save` or `wait`."""
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()

    def _seal(self) -> None:
        """Write the checksums of a checkpoint.

        orbax calls this in the first process before it renames the draft, or in a bucket, before it writes `COMMITTED`.
        """
        if is_in_bucket(self.folder):
            drafts = [one for one in self.folder.glob("[0-9]*") if not (one / COMMITTED).is_file()]
        else:
            drafts = [*self.folder.glob("*.orbax-checkpoint-tmp*")]
        for draft in drafts:
            # Files next to the items are orbax's own, and will be rewritten.
            write_sums(draft, {name: file for name, file in files_in(draft).items() if "/" in name})

    def _restore(self, step: int, **items: Any) -> Any:
        assert self._manager is not None, "steps() lists the restorable checkpoints"
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _writing(self, write: Callable[[ocp.CheckpointManager], Any]) -> None:
        assert self._manager is not None, "begin() comes first"
        try:
            write(self._manager)
        except Exception as error:  # as above
            with contextlib.suppress(OSError):
                self._manager.reload()
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({one_line(error)}). {_usable(self.steps())} Free "
                "space or allow writing, and run the same command again: it resumes from the newest"
            ) from error

    def _guarded(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            check_sums(self.folder / str(step))  # before orbax, which prints in addition to raising
            return read()
        except Exception as error:  # as above
            reason = f": {error}\n" if isinstance(error, TensorError) else f" ({one_line(error)}). "
            others = [one for one in self.steps() if one != step]
            older = [one for one in others if one < step]
            advice = f"pass --resume {max(older)} to resume from there" if older else "pass another --run-dir"
            raise CheckpointError(
                f"{self.folder / str(step)}: the checkpoint cannot be read{reason}{_usable(others)} Nothing was "
                f"changed; {advice}"
            ) from error


class _Policy:
    """Keeps the newest checkpoints and the best one. `LoopState` tracks the best step, the first on a tie."""

    def __init__(self, newest: int, keep_best: bool):
        self._newest, self._keep_best = newest, keep_best
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        last = len(checkpoints) - self._newest
        return [i >= last or self._keep_best and one.step == self.best_step for i, one in enumerate(checkpoints)]


def _target(x: Any) -> Any:
    """The restore target for orbax: an array with the same shape and sharding, or a NumPy array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


def _key_data(key: jax.Array) -> dict[str, np.ndarray]:
    return {"key": np.asarray(jax.random.key_data(key))}


def _usable(steps: Sequence[int]) -> str:
    return f"Usable: {', '.join(f'step {step}' for step in steps)}." if steps else "There are no others."
