"""What is kept of a run while it trains: records and checkpoints."""

from __future__ import annotations

from train.compute.processes import is_first, say
from train.config import ConfigError, TrainConfig
from train.loop.checkpoints import Checkpoints
from train.loop.extend import go_on
from train.loop.loop import Checkpointing
from train.loop.progress import Intervals, Position
from train.report import writers
from train.rundir.claim import ClaimedDirectory
from train.rundir.codec import to_json
from train.rundir.records import Record, Records


class RunFiles:
    """The files of a run that trains, from where it goes on; a context that closes them.

    Attributes:
      path: the run directory.
      records: its metrics.
      saving: its checkpoints, and where the training goes on.
    """

    def __init__(self, config: TrainConfig, place: ClaimedDirectory, plan: str, intervals: Intervals):
        """Open them; ``plan`` is kept beside, and ``intervals`` is the training's.

        Raises:
          ConfigError: if there is no checkpoint of the step that the configuration asks for, or nothing is left
            to train.
          CheckpointError: if the checkpoint cannot be read.
        """
        self.path = place.path
        keep_best = config.keep == "best" or config.keep is None and config.fit.patience is not None
        checkpoints = Checkpoints(place.checkpoints, config.save, keep_best=keep_best)
        position = _resumed(config, place, checkpoints, keep_best)
        peak = getattr(config.learning_rate, config.mode)
        told = go_on(config.fit, peak, intervals, position, finished=place.extends)
        self._resumed = position.step > 0
        if self._resumed:
            say(f"going on with {place.path} after step {position.step}" + (f"\n{told}" if told else "") + "\n")
        identity = to_json(config)
        self._writers = writers.open_writers(config.log if is_first() else (), place.path, identity, position.step + 1)
        self.records = Records(place.metrics, self._writers.write)
        if not self._resumed:
            self.records.cut(0)

        def begin() -> None:
            if place.extends and is_first():
                place.reopen(config)
            checkpoints.delete_after(position.step)
            if self._resumed:
                self.records.cut(position.metrics_bytes, position.metrics_digest)

        self.saving = Checkpointing(
            checkpoints,
            config.save,
            position,
            identity,
            begin,
            self.records.sync,
            keep_best=keep_best,
            again="the same command" if config.resume in (None, "auto") else "the same command with --resume auto",
        )
        if is_first():
            place.write_plan(plan)

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writers.close(failed=error is not None)
        self.saving.checkpoints.close()

    def log_base(self, record: Record) -> None:
        """Keep a record of the base's training; a run that goes on has them."""
        if not self._resumed:
            self.records.write(record)


def _resumed(config: TrainConfig, place: ClaimedDirectory, checkpoints: Checkpoints, keep_best: bool) -> Position:
    """Where the training goes on."""
    steps = checkpoints.steps()
    step = config.resume if isinstance(config.resume, int) else max(steps, default=0)
    if step not in (0, *steps):
        raise ConfigError(
            f"resume: got step {step}, and there are checkpoints of {', '.join(map(str, steps)) or 'no step'};"
            " pass one of these, 0 to begin anew, or --resume auto for the newest"
        )
    if place.extends and not steps:
        raise ConfigError(f"run_dir: {place.path} has no checkpoint to go on from; pass another --run-dir")
    position = checkpoints.position(step) if step else Position()
    if keep_best and position.best_step not in (None, *steps):
        say(f"the best checkpoint by then, of step {position.best_step}, is gone: the best one is looked for anew")
        position.best, position.best_step, position.stale = None, None, 0
    return position
