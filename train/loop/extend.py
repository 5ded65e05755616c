"""A run that is trained further than it was planned: it is told, exact where the schedule allows, or refused.

The order of the data and dropout's masks are functions of the step, so that they are those of a run that was planned
with these epochs. The learning rate depends on the number of all steps: from the step on at which a run goes on, it is
that of the new plan. A position keeps which epochs were planned from which step on.
"""

from __future__ import annotations

import numpy as np

from train.compute.optimizer import make_schedule
from train.config import ConfigError, FitConfig
from train.loop.progress import Intervals, Position


def go_on(fit: FitConfig, peak: float, intervals: Intervals, position: Position, *, finished: bool) -> str:
    """Note in ``position`` that the training goes on as ``fit`` and ``intervals`` say.

    Args:
      peak: of the learning rate.
      finished: whether it had come to its end.

    Returns:
      What a person should know of it; empty where it goes on as it was planned.

    Raises:
      ConfigError: if nothing is left to train.
    """
    step = position.step
    if step > intervals.steps or finished and step == intervals.steps:
        raise ConfigError(
            f"fit.epochs: got {fit.epochs}, which are {intervals.steps} steps, and the run is at step {step}: nothing "
            f"is left to train; pass --fit.epochs {step // intervals.epoch + 1} or more, or --resume STEP for an "
            "earlier one"
        )
    if finished and fit.patience is not None and position.stale >= fit.patience:
        raise ConfigError(
            f"fit.patience: got {fit.patience}, and the run ended after {position.stale} measurements in a row without "
            f"a better one: nothing is left to train; pass --fit.patience {position.stale + 1} or more, or None"
        )
    trained = [[start, epochs] for start, epochs in position.planned if start < step]
    former = trained[-1][1] if trained else fit.epochs
    position.planned = trained if trained and former == fit.epochs else [*trained, [step, fit.epochs]]
    return "" if former == fit.epochs else _told(fit, peak, intervals, step, trained)


def _told(fit: FitConfig, peak: float, intervals: Intervals, step: int, trained: list[list[int]]) -> str:
    text = f"fit.epochs is {fit.epochs} and was {trained[-1][1]}: step {step + 1} of {intervals.steps} is next. "
    had = _rates(fit, peak, intervals, trained, step)
    planned = _rates(fit, peak, intervals, [[0, fit.epochs]], step + 1)
    most = int(np.abs(had - planned[:-1]).argmax())
    if had[most] == planned[most]:
        text += "All learning rates are those of a run that was planned so, and so is what it learns"
    else:
        text += (
            f"Its learning rate, {planned[-1]:.2e}, and the later ones are those of a run that was planned so. The "
            f"earlier ones were others, in step {most + 1} {had[most]:.2e} instead of {planned[most]:.2e}: what is "
            "learnt differs from such a run; with --fit.schedule constant and --fit.warmup 0 it would not"
        )
    if step == trained[-1][1] * intervals.epoch and not intervals.is_eval_due(step):
        text += f". Step {step} was measured, as the last one; such a run would not have measured it"
    return text


def _rates(fit: FitConfig, peak: float, intervals: Intervals, planned: list[list[int]], steps: int) -> np.ndarray:
    """The learning rates of the first ``steps``, float32, where so many epochs were planned from these steps on."""
    found = np.zeros(steps, np.float32)
    for start, epochs in planned:
        schedule = make_schedule(fit, peak, epochs * intervals.epoch)
        found[start:] = np.asarray(schedule(np.arange(start, steps)))
    return found
