"""The picture of a sweep: the main metric over each swept field, drawn with matplotlib, which is imported on use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.files.drafts import drafts
from train.report.curves import COLOURS, STYLE
from train.sweep.members import shown
from train.sweep.results import FINISHED, Result, data_sets, winners

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"data": "data set", "lr": "learning rate", "lora_plus": "LoRA+ ratio", "weight_decay": "weight decay"}
LOGARITHMIC = ("rank", "alpha", "lr", "lora_plus", "weight_decay")
"""Fields on a logarithmic axis, if all values are positive."""

COLUMNS = 3


def draw_sweep(path: Path, results: Sequence[Result], primary: str, higher_is_better: bool) -> None:
    """Draw the main metric of the members over each swept field that has several values, as a PNG.

    A dot is a member, hollow if it ended early; those of one value stand side by side, and a line joins the values'
    means. A ring marks the best member, or the best of each data set. Crosses at the bottom are members without a
    metric.

    Args:
      results: at least one, all with the same swept fields.
      primary: the name of the main metric.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fields = list(results[0].values)
    fields = [name for name in fields if len({one.values[name] for one in results}) > 1] or fields[:1]
    names, best = data_sets(results), winners(results, higher_is_better)
    rows = math.ceil(len(fields) / COLUMNS)
    columns = math.ceil(len(fields) / rows)
    widths = [3.4] * columns
    if fields[0] == "data":
        widths[0] = min(max(3.4, 0.2 * len(names)), 14)
    size = (max(5.5, sum(widths)), 0.6 + 2.9 * rows)
    with rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False, width_ratios=widths)
        legend: dict[str, Any] = {}
        for axes, field in itertools.zip_longest(grid.flat, fields):
            if field is None:
                axes.set_axis_off()
            else:
                legend |= _draw_panel(axes, field, results, best if field == "data" or len(best) == 1 else ())
        for axes in grid[:, 0]:
            axes.set_ylabel(primary.replace("_", " "))
        _set_range(grid[0, 0], [one.metric for one in results], falling=not higher_is_better)
        if len(best) == 1:
            figure.suptitle(f"best: {best[0].name}, {primary.replace('_', ' ')} {best[0].metric:.4f}")
        if len(legend) > 3 or len(best) > 1:
            figure.legend(handles=list(legend.values()), loc="outside lower center", ncols=len(legend), frameon=False)
        with drafts(path) as (draft,):
            figure.savefig(draft, dpi=150, format="png")


def _draw_panel(axes: Axes, field: str, results: Sequence[Result], best: Sequence[Result]) -> dict[str, Any]:
    """Draw the members over one field; returns what it drew, by kind, for a legend."""
    values = list(dict.fromkeys(one.values[field] for one in results))
    values = values if field == "data" else sorted(values)
    logarithmic = field in LOGARITHMIC and min(values) > 0
    places = {value: math.log10(value) if logarithmic else float(i) for i, value in enumerate(values)}
    spread = _spread(field, results, places)
    measured = [one for one in results if one.metric is not None]
    drawn: dict[str, Any] = {}

    def dots(label: str, chosen: Sequence[Result], **style: Any) -> None:
        if chosen:
            x, y = [spread[one.name] for one in chosen], [one.metric or 0.0 for one in chosen]
            drawn[label] = axes.scatter(x, y, label=label, **style)

    if field != "data":
        of_value = {value: [one.metric or 0.0 for one in measured if one.values[field] == value] for value in values}
        line = [(places[value], np.mean(found)) for value, found in of_value.items() if found]
        if line:
            style: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.6, "alpha": 0.5, "zorder": 1}
            drawn["mean"] = axes.plot(*zip(*line, strict=True), label="mean", **style)[0]
    blue: dict[str, Any] = {"s": 28, "edgecolor": COLOURS[0], "linewidth": 0.9, "alpha": 0.8, "zorder": 2}
    dots("finished", [one for one in measured if one.status == FINISHED], facecolor=COLOURS[0], **blue)
    dots("ended early", [one for one in measured if one.status != FINISHED], facecolor="white", **blue)
    dots("best", best, s=110, facecolor="none", edgecolor=COLOURS[1], linewidth=1.8, zorder=3)
    if lost := [spread[one.name] for one in results if one.metric is None]:
        bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "marker": "x", "s": 24, "linewidth": 1.2}
        drawn["lost"] = axes.scatter(lost, [0.04] * len(lost), color=COLOURS[1], label="no metric", **bottom)
    names = data_sets(results) if field == "data" else {value: _short(value) for value in values}
    _set_ticks(axes, field, {names[value]: place for value, place in places.items()})
    return drawn


def _spread(field: str, results: Sequence[Result], places: Mapping[Any, float]) -> dict[str, float]:
    """The place of each member on the axis: those of one value side by side, in less room than to the next value."""
    at = list(places.values())
    gap = min((after - before for before, after in itertools.pairwise(at)), default=1.0)
    gap = min(gap, 0.4 * (at[-1] - at[0]) or gap)
    found: dict[str, float] = {}
    for value, place in places.items():
        names = [one.name for one in results if one.values[field] == value]
        offsets = np.linspace(-0.1, 0.1, len(names)) if len(names) > 1 else [0.0]
        found |= {name: place + gap * float(offset) for name, offset in zip(names, offsets, strict=True)}
    return found


def _set_ticks(axes: Axes, field: str, places: Mapping[str, float]) -> None:
    """A tick for each value; a label too, where there is room."""
    at = list(places.values())
    wide = at[-1] - at[0]
    margin = 0.7 if field == "data" else 0.15 * wide or 0.5
    last, labels = -math.inf, []
    for name, place in places.items():
        fits = field == "data" or place - last >= 0.16 * wide
        last = place if fits else last
        labels.append(name if fits else "")
    turned: dict[str, Any] = {"rotation": 90, "fontsize": 7 if len(at) > 16 else 9}
    turned = turned if field == "data" and len(at) > 4 else {}
    axes.set_xticks(at, labels, minor=False, **turned)
    axes.set_xlim(at[0] - margin, at[-1] + margin)
    axes.set_xlabel(LABELS.get(field, field))
    axes.grid(True)


def _set_range(axes: Axes, metrics: Sequence[float | None], *, falling: bool) -> None:
    """Room for crosses below the dots, and a logarithmic axis for losses of several magnitudes."""
    known = [one for one in metrics if one is not None]
    if falling and known and 0 < 10 * min(known) < max(known):
        axes.set_yscale("log")
    elif known and len(known) < len(metrics):
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.09 * (high - low), high)
    elif not known:
        axes.set_yticks([])


def _short(value: float) -> str:
    """The shorter one of 0.0001 and 1e-4."""
    return min(shown(value), np.format_float_scientific(value, trim="-", exp_digits=1), key=len)
