"""What is kept of a run while it trains: records and checkpoints."""

from __future__ import annotations

from train import store, writers
from train.checkpoints import Checkpoints
from train.config import ConfigError, TrainConfig
from train.loop import Saving
from train.processes import is_first, say
from train.progress import Position
from train.records import Record, Records
from train.rundir import RunDir


class Kept:
    """The files of a run that trains, from where it goes on; a context that closes them.

    Attributes:
      path: the run directory.
      records: its metrics.
      saving: its checkpoints, and where the training goes on.
    """

    def __init__(self, config: TrainConfig, place: RunDir, plan: str):
        """Open them; ``plan`` is kept beside.

        Raises:
          ConfigError: if there is no checkpoint of the step that the configuration asks for.
          CheckpointError: if the checkpoint cannot be read.
        """
        self.path, self._lock = place.path, place.lock
        checkpoints = Checkpoints(place.path / "checkpoints", config.save, keep_best=config.keep == "best")
        position = _resumed(config, checkpoints)
        self._resumed = position.step > 0
        if self._resumed:
            say(f"going on with {place.path} after step {position.step}\n")
        identity = store.to_json(config)
        self._writers = writers.open_writers(config.log if is_first() else (), place.path, identity, position.step + 1)
        self.records = Records(place.path / "metrics.jsonl", self._writers.write)
        if not self._resumed:
            self.records.cut(0)

        def begin() -> None:
            checkpoints.delete_after(position.step)
            if self._resumed:
                self.records.cut(position.metrics_bytes, position.metrics_digest)

        self.saving = Saving(
            checkpoints,
            config.save,
            position,
            identity,
            begin,
            self.records.sync,
            keep_best=config.keep == "best",
            again="the same command" if config.resume == "auto" else "the same command with --resume auto",
        )
        if is_first():
            (place.path / "plan.txt").write_text(plan + "\n")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writers.close(failed=error is not None)
        self.saving.checkpoints.close()
        if self._lock is not None:
            self._lock.release()

    def log_base(self, record: Record) -> None:
        """Keep a record of the base's training; a run that goes on has them."""
        if not self._resumed:
            self.records.write(record)


def _resumed(config: TrainConfig, checkpoints: Checkpoints) -> Position:
    """Where the training goes on."""
    steps = checkpoints.steps()
    step = config.resume if isinstance(config.resume, int) else max(steps, default=0)
    if step not in (0, *steps):
        raise ConfigError(
            f"resume: got step {step}, and there are checkpoints of {', '.join(map(str, steps)) or 'no step'};"
            " pass one of these, 0 to begin anew, or --resume auto for the newest"
        )
    position = checkpoints.position(step) if step else Position()
    if config.keep == "best" and position.best_step not in (None, *steps):
        say(f"the best checkpoint by then, of step {position.best_step}, is gone: the best one is looked for anew")
        position.best, position.best_step, position.stale = None, None, 0
    return position
