"""The files of a run during training: metrics and checkpoints."""

from __future__ import annotations

import jax

from train.compute.layouts import Layout
from train.compute.processes import is_first, wait_for_all
from train.compute.step import TrainState
from train.config import ConfigError, SaveConfig, TrainConfig
from train.loop.checkpoints import Checkpoints
from train.loop.extend import extend
from train.loop.state import Intervals, LoopState
from train.report import writers
from train.rundir.claim import ClaimedDirectory
from train.rundir.codec import to_json
from train.rundir.records import Record, open_records


class RunFiles:
    """The metrics and checkpoints of a run; a context manager that closes them.

    Opening only reads. `begin`, for a new run, and `resume`, for one with a checkpoint, modify the directory.

    Attributes:
      path: the run directory.
      config: the run's.
      state: the loop's, at the step where training starts.
      note: text to print for a run that was stopped before; empty for a new one.
      keep_best: whether to keep the best adapters instead of the last ones.
      records: the metrics.
      checkpoints: the training's checkpoints.
      command: the command that resumes the run, for messages.
    """

    def __init__(self, config: TrainConfig, directory: ClaimedDirectory, plan: str, intervals: Intervals):
        """Open the files of a run.

        Args:
          plan: the content of plan.txt.
          intervals: the intervals of training.

        Raises:
          ConfigError: if ``resume`` is a step without a checkpoint, or nothing is left to train.
          CheckpointError: if the checkpoint cannot be read.
        """
        self.path, self.config, self._directory, self._plan = directory.path, config, directory, plan
        self.keep_best = config.keeps_best
        again = "" if config.resume in (None, "auto") else " with --resume auto"
        self.command = f"the same command{again}"
        self.records = open_records(directory.metrics)
        self.checkpoints = Checkpoints(directory.checkpoints, config.save, keep_best=self.keep_best)
        self._identity, self._writers = to_json(config), writers.Writers(())
        self.state, notes = self._stored_state(), []
        if self.keep_best and self.state.best_step not in (None, *self.checkpoints.steps()):
            notes.append(f"the best checkpoint, of step {self.state.best_step}, is missing: keeping the best later one")
            self.state.best_metric, self.state.best_step, self.state.evals_since_best = None, None, 0
        peak = getattr(config.learning_rate, config.mode)
        extension = extend(config.fit, peak, intervals, self.state, finished=directory.extends)
        if self.state.step:
            notes += [f"resuming {self.path} after step {self.state.step}", extension]
        elif config.resume != 0 and directory.metrics.is_file() and directory.metrics.read_bytes():
            notes.append(f"{self.path} was stopped before its first checkpoint: training starts over")
        self.note = "\n".join(note for note in notes if note)

    @property
    def saving(self) -> SaveConfig:
        return self.config.save

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writers.close(failed=error is not None)
        self.checkpoints.close()
        self.records.close()

    def _stored_state(self) -> LoopState:
        """The loop's state in the configured checkpoint, or a new run's."""
        steps, asked = self.checkpoints.steps(), self.config.resume
        step = asked if isinstance(asked, int) else max(steps, default=0)
        if step not in (0, *steps):
            raise ConfigError(
                f"resume: got step {step}; there are checkpoints of {', '.join(map(str, steps)) or 'no step'};"
                " pass one of these, 0 to start over, or --resume auto for the newest"
            )
        if self._directory.extends and not steps:
            raise ConfigError(f"run_dir: {self.path} has no checkpoint to resume from; pass another --run-dir")
        return self.checkpoints.loop_state(step) if step else LoopState()

    def begin(self) -> None:
        """Start a new run: delete metrics and checkpoints of an earlier one."""
        self._open_to_write()
        self.records.cut(0)

    def resume(self, layout: Layout, like: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
        """Restore the checkpoint, then drop later metrics and checkpoints.

        Arguments, results and errors as for `Checkpoints.restore`; an error leaves all files unchanged.
        """
        restored = self.checkpoints.restore(self.state.step, layout, like, key)
        self._open_to_write()
        self.records.cut(self.state.metrics_bytes, self.state.metrics_digest)
        return restored

    def _open_to_write(self) -> None:
        step = self.state.step
        wait_for_all("read")  # what an earlier run left, before the first process changes it
        if is_first():
            self._writers = writers.open_writers(self.config.log, self.path, self._identity, step + 1)
            if self._directory.extends:
                self._directory.reopen(self.config)
            self._directory.write_plan(self._plan)
        self.checkpoints.begin(step)

    def log(self, record: Record) -> None:
        """Append a record to the metrics, and pass it to TensorBoard and Weights & Biases."""
        self.records.write(record)
        self._writers.write(record)

    def log_base(self, record: Record) -> None:
        """`log` a record of the base's training; a resumed run already has it."""
        if not self.state.step:
            self.log(record)

    def save(self, layout: Layout, train_state: TrainState, key: jax.Array) -> None:
        """Write a checkpoint in the background, with `state` as the loop's; raises as `Checkpoints.save`."""
        self.state.metrics_bytes, self.state.metrics_digest = self.records.sync()
        self.checkpoints.save(layout, train_state, self.state, key, self._identity)
