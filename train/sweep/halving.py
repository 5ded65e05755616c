"""Successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): the best members go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.config import ConfigError
from train.loop.state import Intervals, PrimaryMetric


def rungs(intervals: Intervals, count: int, factor: int) -> dict[int, int]:
    """The number of members that go on, by the step of the evaluation that decides.

    Of ``count`` members, ``count // factor**k`` go on after rung k, at least one, until one is left. The last rung is
    after the share ``1 / factor`` of all steps, each earlier one after that share of the next one's, at the next
    evaluation from there.

    Raises:
      ConfigError: if there is no evaluation before the last step.
    """
    levels = int(math.log(count, factor) + 1e-9) or 1
    found: dict[int, int] = {}
    for level in range(1, levels + 1):
        least = math.ceil(intervals.steps / factor ** (levels - level + 1))
        step = next((s for s in range(max(least, 1), intervals.steps) if intervals.is_eval_due(s)), None)
        if step is not None:
            found[step] = max(1, count // factor**level)
    if not found:
        raise ConfigError(
            f"sweep.halving: got {factor}, but the first evaluation is after the last of {intervals.steps} steps, and "
            "nothing decides who goes on; pass a smaller --eval-every-steps"
        )
    return found


def left_behind(values: Sequence[float | None], keep: int, metric: PrimaryMetric) -> list[int]:
    """The indices of all but the ``keep`` best ``values``; the first on a tie. None and NaN are the worst."""

    def cost(i: int) -> float:
        value = values[i]
        if value is None or math.isnan(value):
            return math.inf
        return -value if metric.higher_is_better else value

    return sorted(sorted(range(len(values)), key=cost)[keep:])
