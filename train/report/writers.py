"""Writers that send a run's records to TensorBoard and to Weights & Biases.

Every number of a record is logged as ``phase/name`` (``fit/loss``) over the steps of its phase. A writer that is not
configured is not imported.

    runs/digits-lora-seed0-20261122-120000/
      tensorboard/base, tensorboard/fit   event files: tensorboard --logdir runs
      wandb/                              files of Weights & Biases; id is the run's id there. For a run in a bucket,
                                          only id is there, and other files in the machine's temporary folder
"""

from __future__ import annotations

import importlib
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jlora.files.buckets import absolute, is_in_bucket
from train.config import ConfigError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that each writer needs; the extra with the writer's name installs it."""


class Writers:
    """Writes a run's records. Use as a context manager, or `close` it."""

    def __init__(self, writers: Sequence[_Writer]):
        self._writers = writers

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error is not None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of ``record``."""
        phase, step = record["phase"], record["step"]
        numbers = {
            f"{phase}/{name}": float(value)
            for name, value in record.items()
            if name not in ("step", "epoch") and isinstance(value, int | float)
        }
        for writer in self._writers:
            writer.write(phase, step, numbers)

    def close(self, failed: bool = False) -> None:
        """Write what is still buffered; the run has ended, or ``failed``."""
        for writer in self._writers:
            writer.close(failed)


def check(names: Sequence[str]) -> None:
    """Check that all writers of these ``names`` can be opened.

    Raises:
      ConfigError: if packages are missing, with the command that installs them.
    """
    missing = [name for name in names if not _importable(PACKAGES[name])]
    if missing:
        needed = "; ".join(f"{name} needs the package {PACKAGES[name]}, which cannot be imported" for name in missing)
        raise ConfigError(f"{needed}. Run: pip install -e '.[{','.join(missing)}]'")


def open_writers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any], first_step: int = 1) -> Writers:
    """The writers of these ``names`` ("tensorboard", "wandb"), after `check`.

    Args:
      run_dir: the run directory, whose name is the run's.
      config: the run's configuration as JSON, which Weights & Biases shows.
      first_step: the first step to train: 1, or the one after the checkpoint that a run resumes from. TensorBoard hides
        later values of a killed process. Weights & Biases cannot: these steps appear twice there.

    Raises:
      ConfigError: if Weights & Biases refuses, for example without an account.
    """
    make = {
        "tensorboard": lambda: _TensorBoard(run_dir / "tensorboard", first_step),
        "wandb": lambda: _Wandb(run_dir, config),
    }
    return Writers([make[name]() for name in names])


def _importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


class _Writer(Protocol):
    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    """Event files by tensorboardX, which needs neither TensorFlow nor PyTorch.

    Each phase has its own folder: ``purge_step`` hides steps of the whole folder, and the base, whose steps count
    from 1 too, is not retrained when the fit resumes.
    """

    def __init__(self, folder: Path, first_step: int):
        self._folder, self._first_step = folder, first_step
        self._phases: dict[str, Any] = {}

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._phases[phase] = self._open(phase)
        for tag, value in numbers.items():
            self._phases[phase].add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        for writer in self._phases.values():
            writer.close()

    def _open(self, phase: str) -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(
            str(self._folder / phase),
            purge_step=self._first_step,
            flush_secs=10,
            # Files are named after the second of their opening: without a suffix, one could overwrite another.
            filename_suffix=f".{time.time_ns()}",
        )


class _Wandb:
    """A run of Weights & Biases; the same one whenever a run directory resumes.

    Its own steps must not decrease, but ours do when the next phase starts or a run resumes. So each phase logs its
    step as a metric, the x-axis of the others.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        try:
            self._run = wandb.init(
                project="jlora",
                name=absolute(run_dir).name,
                id=_wandb_id(run_dir),
                resume="allow",
                dir=tempfile.mkdtemp(prefix="jlora-") if is_in_bucket(run_dir) else str(run_dir),
                config=dict(config),
            )
        except wandb.Error as error:
            reason = str(error).rstrip(".")
            raise ConfigError(f"wandb: {reason}. Or set WANDB_MODE=offline to keep its files in {run_dir}") from error
        self._phases: set[str] = set()

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._phases.add(phase)
        self._run.log({f"{phase}/step": step, **numbers})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(run_dir: Path) -> str:
    """The id of the run, stored in its directory: another directory of the same name is another run."""
    path = run_dir / "wandb" / "id"
    if not path.exists():
        if not is_in_bucket(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()
