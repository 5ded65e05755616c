"""How the members of a sweep ended: their ranking, the table and the summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlora.messages import table
from train.sweep.members import short_names, shown

FINISHED = "finished"
"""The status of a member that trained to the end."""

MOST_ROWS = 40
"""The table of a larger sweep has only the best `BEST_ROWS`."""

BEST_ROWS = 20


@dataclass(frozen=True)
class Result:
    """How a member ended.

    Attributes:
      name, values: the member's; see `train.sweep.members.Member`.
      status: `FINISHED`, or why it ended earlier: ``dropped: 6 of 12 were better``, ``diverged in step 12``.
      steps: the number of steps that it trained.
      metric: the main metric of the adapters that it keeps; None without an evaluation, or if it is not finite.
      loss: its last training loss; None if there is none, or if it is not finite.
      run_dir: its run directory; None without adapters to keep.
    """

    name: str
    values: dict[str, Any]
    status: str
    steps: int
    metric: float | None
    loss: float | None
    run_dir: str | None

    def __post_init__(self) -> None:
        for name in ("metric", "loss"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        return cls(**value)


def ranked(results: Sequence[Result], higher_is_better: bool) -> list[Result]:
    """The results, best first; equal ones in their order, and those without a metric last."""
    sign = -1 if higher_is_better else 1
    return sorted(results, key=lambda one: math.inf if one.metric is None else sign * one.metric)


def winners(results: Sequence[Result], higher_is_better: bool) -> list[Result]:
    """The best result of each data set, in their order: of all results if these have one. Empty without a metric.

    Metrics on different data do not compare.
    """
    best: dict[Any, Result] = {}
    for one in ranked(results, higher_is_better):
        if one.metric is not None:
            best.setdefault(one.values.get("data"), one)
    return [best[data] for data in dict.fromkeys(one.values.get("data") for one in results) if data in best]


def data_sets(results: Sequence[Result]) -> dict[str, str]:
    """Short names of the data sets, by their sources."""
    sources = list(dict.fromkeys(one.values["data"] for one in results if "data" in one.values))
    return dict(zip(sources, short_names(sources), strict=True))


def sweep_table(results: Sequence[Result], primary: str, higher_is_better: bool) -> str:
    """The results as a table, best first, those of a data set together; a star marks the best.

    Of more than `MOST_ROWS` members it has the best `BEST_ROWS`; with several data sets, the best of these.

    Args:
      results: at least one, all with the same swept fields.
      primary: the name of the main metric.
    """
    names, best = data_sets(results), winners(results, higher_is_better)
    order = {source: place for place, source in enumerate(names)}
    rows = sorted(ranked(results, higher_is_better), key=lambda one: order.get(one.values.get("data", ""), 0))
    if len(rows) > MOST_ROWS:
        rows = (best if len(names) > 1 else rows)[:BEST_ROWS]
    fields = list(results[0].values)
    header = ["", *fields, primary, "last loss", "steps", "ended"]
    numbers = [place for place, name in enumerate(header) if name not in ("", "data", "ended")]
    cells = [
        [
            "*" if one in best else "",
            *(names[value] if field == "data" else shown(value) for field, value in one.values.items()),
            *("-" if value is None else f"{value:.4f}" for value in (one.metric, one.loss)),
            f"{one.steps:,}",
            one.status,
        ]
        for one in rows
    ]
    hidden = len(results) - len(rows)
    more = f"\nand {hidden:,} more members, in summary.json" if hidden else ""
    return f"{table(header, cells, right=numbers)}{more}"


def sweep_summary(
    results: Sequence[Result], primary: str, higher_is_better: bool, seconds: float, **more: Any
) -> dict[str, Any]:
    """The content of a sweep's summary.json.

    ``members`` has all results, in the members' order. ``best`` and ``best_run_dir`` are None without a metric, and
    with several data sets, where ``best_of_data`` has the best member's name for each source.

    Args:
      primary: the name of the main metric.
      seconds: the time that the sweep took.
      more: further entries.
    """
    best = winners(results, higher_is_better)
    several = len(data_sets(results)) > 1
    only = best[0] if best and not several else None
    return {
        "kind": "sweep",
        "primary_metric": primary,
        "higher_is_better": higher_is_better,
        "best": only and only.name,
        "best_run_dir": only and only.run_dir,
        **({"best_of_data": {one.values["data"]: one.name for one in best}} if several else {}),
        "seconds": round(seconds, 2),
        **more,
        "members": [one.to_json() for one in results],
    }
