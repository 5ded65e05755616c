"""The picture of a sweep: the main metric over each swept field, drawn with matplotlib, which is imported on use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.files.drafts import drafts
from train.report.curves import COLOURS, INK, STYLE
from train.sweep.members import shown
from train.sweep.results import FINISHED, Result, data_sets, winners

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "data": "data set",
    "lr": "learning rate",
    "lora_plus": "LoRA+ ratio",
    "weight_decay": "weight decay",
}
LOGARITHMIC = ("rank", "alpha", "lr", "lora_plus", "weight_decay")
"""Fields on a logarithmic axis, if all values are positive."""

COLUMNS = 3
MOST_TICKS = 8
EARLY = "ended early"


def draw_sweep(path: Path, results: Sequence[Result], primary: str, higher_is_better: bool) -> None:
    """Draw the main metric of the members over each swept field that has several values, as a PNG.

    A dot is a member, hollow if it ended early; a line joins the means over a value's members; a ring marks the best
    member, or the best of each data set. Crosses at the bottom are members without a metric.

    Args:
      results: at least one, all with the same swept fields.
      primary: the name of the main metric.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fields = list(results[0].values)
    fields = [name for name in fields if len({one.values[name] for one in results}) > 1] or fields[:1]
    columns = min(COLUMNS, len(fields))
    rows = math.ceil(len(fields) / columns)
    best = winners(results, higher_is_better)
    with rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(max(5.5, 3.4 * columns), 0.5 + 2.9 * rows), layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        handles: dict[str, Any] = {}
        for place, axes in enumerate(grid.flat):
            if place >= len(fields):
                axes.set_axis_off()
                continue
            handles |= _draw_panel(axes, fields[place], results, best)
            if place % columns == 0:
                axes.set_ylabel(primary.replace("_", " "))
        values = [one.metric for one in results if one.metric is not None]
        if values and not higher_is_better and 0 < 10 * min(values) < max(values):
            grid[0, 0].set_yscale("log")
        if len(best) == 1:
            figure.suptitle(f"best: {best[0].name}, {primary.replace('_', ' ')} {best[0].metric:.4f}", color=INK)
        if len(handles) > 3 or len(best) > 1:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
            )
        with drafts(path) as (draft,):
            figure.savefig(draft, dpi=150, format="png")


def _draw_panel(axes: Axes, field: str, results: Sequence[Result], best: Sequence[Result]) -> dict[str, Any]:
    """Draw the members over one field; returns what it drew, by its text in a legend."""
    values = list(dict.fromkeys(one.values[field] for one in results))
    if field != "data":
        values.sort()
    logarithmic = field in LOGARITHMIC and min(values) > 0
    place = {value: float(value) if logarithmic else float(i) for i, value in enumerate(values)}
    measured = [one for one in results if one.metric is not None]
    drawn: dict[str, Any] = {}
    means = {value: [one.metric for one in measured if one.values[field] == value] for value in values}
    line = [(place[value], sum(found) / len(found)) for value, found in means.items() if found]
    if line and field != "data":
        drawn["mean"] = axes.plot(*zip(*line, strict=True), color=COLOURS[0], linewidth=1.6, alpha=0.55, zorder=1)[0]
    for label, face in ((FINISHED, COLOURS[0]), (EARLY, "white")):
        dots = [
            (place[one.values[field]], one.metric)
            for one in measured
            if (one.status == FINISHED) == (label == FINISHED)
        ]
        if dots:
            style: dict[str, Any] = {"s": 30, "facecolor": face, "edgecolor": COLOURS[0], "linewidth": 0.9}
            drawn[label] = axes.scatter(*zip(*dots, strict=True), alpha=0.75, zorder=2, **style)
    if best:
        dots = [(place[one.values[field]], one.metric) for one in best]
        style = {"s": 110, "facecolor": "none", "edgecolor": COLOURS[1], "linewidth": 1.8}
        drawn["best"] = axes.scatter(*zip(*dots, strict=True), zorder=3, **style)
    if lost := [place[one.values[field]] for one in results if one.metric is None]:
        style = {"transform": axes.get_xaxis_transform(), "color": COLOURS[1], "s": 26, "linewidth": 1.2}
        drawn["no metric"] = axes.scatter(lost, [0.03] * len(lost), marker="x", clip_on=False, zorder=3, **style)
    names = data_sets(results) if field == "data" else {value: shown(value) for value in values}
    _set_ticks(axes, [place[value] for value in values], [names[value] for value in values], logarithmic, field)
    return drawn


def _set_ticks(axes: Axes, places: Sequence[float], names: Sequence[str], logarithmic: bool, field: str) -> None:
    """Ticks at the values, of many at some."""
    from matplotlib.ticker import NullLocator

    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        margin = (places[-1] / places[0]) ** 0.12 if len(places) > 1 else 2
        axes.set_xlim(places[0] / margin, places[-1] * margin)
    else:
        axes.set_xlim(-0.5, len(places) - 0.5)
    every = 1 if field == "data" else math.ceil(len(places) / MOST_TICKS)
    turned = {"rotation": 90, "fontsize": 7 if len(names) > 20 else 9} if field == "data" and len(names) > 4 else {}
    axes.set_xticks(places[::every], names[::every], **turned)
    axes.set_xlabel(LABELS.get(field, field))
    axes.grid(True)
