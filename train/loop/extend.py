"""Runs resumed with another number of epochs than planned.

The order of the data and dropout's masks are functions of the step, independent of the number of epochs. The
learning rate is not: from the step where the run resumes, it follows the new number. `LoopState` records the planned
numbers of epochs and their first steps, so the learning rates of all steps are known and comparable.
"""

from __future__ import annotations

import numpy as np

from train.compute.optimizer import make_schedule
from train.config import ConfigError, FitConfig
from train.loop.state import Intervals, LoopState


def extend(fit: FitConfig, peak: float, intervals: Intervals, state: LoopState, *, finished: bool) -> str:
    """Add the number of epochs in ``fit`` to the planned ones in ``state``.

    Args:
      peak: peak learning rate.
      finished: whether the run finished.

    Returns:
      A comparison of the result with a run of these epochs from the start; empty if their number did not change.

    Raises:
      ConfigError: if nothing is left to train.
    """
    step = state.step
    if step > intervals.steps or finished and step == intervals.steps:
        raise ConfigError(
            f"fit.epochs: got {fit.epochs}, which is {intervals.steps} steps, and the run is at step {step}: nothing "
            f"is left to train; pass --fit.epochs {step // intervals.epoch + 1} or more, or --resume STEP for an "
            "earlier one"
        )
    if finished and fit.patience is not None and state.evals_since_best >= fit.patience:
        raise ConfigError(
            f"fit.patience: got {fit.patience}, and the run ended after {state.evals_since_best} evaluations in a row "
            f"without a better one: nothing is left to train; pass --fit.patience {state.evals_since_best + 1} or "
            "more, or None"
        )
    trained = [[start, epochs] for start, epochs in state.planned_epochs if start < step]
    former = trained[-1][1] if trained else fit.epochs
    state.planned_epochs = trained if trained and former == fit.epochs else [*trained, [step, fit.epochs]]
    return "" if former == fit.epochs else _comparison(fit, peak, intervals, step, trained)


def _comparison(fit: FitConfig, peak: float, intervals: Intervals, step: int, trained: list[list[int]]) -> str:
    text = f"fit.epochs is {fit.epochs} and was {trained[-1][1]}: step {step + 1} of {intervals.steps} is next. "
    actual = learning_rates(fit, peak, intervals, trained, step)
    planned = learning_rates(fit, peak, intervals, [[0, fit.epochs]], step + 1)
    worst = int(np.abs(actual - planned[:-1]).argmax())
    if actual[worst] == planned[worst]:
        text += f"All learning rates, and so the result, are those of a run of {fit.epochs} epochs from the start"
    else:
        text += (
            f"From there the learning rate, {planned[-1]:.2e}, is that of a run of {fit.epochs} epochs from the start. "
            f"Earlier steps had another one (step {worst + 1}: {actual[worst]:.2e} instead of {planned[worst]:.2e}), "
            "so the result differs from that run's; with --fit.schedule constant and --fit.warmup 0 it would not"
        )
    if step == trained[-1][1] * intervals.epoch and not intervals.is_eval_due(step):
        text += f". Step {step} was evaluated as the last one, which that run would skip"
    return text


def learning_rates(
    fit: FitConfig, peak: float, intervals: Intervals, planned: list[list[int]], steps: int
) -> np.ndarray:
    """The learning rates of the first ``steps``, float32, with ``[step, epochs]`` planned."""
    found = np.zeros(steps, np.float32)
    for start, epochs in planned:
        schedule = make_schedule(fit, peak, epochs * intervals.epoch)
        found[start:] = np.asarray(schedule(np.arange(start, steps)))
    return found
