"""Curves and the picture of a report, drawn with matplotlib, which is imported on use."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.report.reading import Points, ReportedRun
from train.report.tables import curves, main_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#a08a00")
"""The runs' colours in order, after Okabe and Ito: distinct for any colour vision, on light and dark pages."""

LINES = ("solid",) * 4 + ("dashed",) * 4
"""The runs' line styles in order, in the page's CSS and in matplotlib."""

INK = "#5b6472"
"""The colour of axes and labels; in the page they take its text colour instead."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "jlora",  # the same runs give the same page
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is literal
    "xtick.color": INK,
    "ytick.color": INK,
}
SVG_METADATA = ("Creator", "Date", "Format", "Type")
"""Metadata that matplotlib would write into an SVG: web addresses, and the time."""


def svg(runs: Sequence[ReportedRun]) -> str:
    """The curves as an SVG element; empty if there are none."""
    if not curves(runs):
        return ""
    drawn = _saved(runs, table=False, format="svg", transparent=True, metadata=dict.fromkeys(SVG_METADATA)).decode()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")


def picture(runs: Sequence[ReportedRun]) -> bytes:
    """The main metrics and the curves, as a PNG."""
    return _saved(runs, table=True, format="png", dpi=150, facecolor="white")


def _saved(runs: Sequence[ReportedRun], *, table: bool, **how: Any) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = curves(runs)
    last = max((step for lines in panels.values() for points in lines for step, _ in points), default=1)
    heights = [0.22 * (len(runs) + 3)] * table + [2.7] * math.ceil(len(panels) / 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        if table:
            _draw_table(figure.add_subplot(grid[0, :]), runs)
        for place, (title, lines) in enumerate(panels.items(), 2 * table):
            _draw_lines(figure.add_subplot(grid[place // 2, place % 2]), title, lines, last)
        file = io.BytesIO()
        figure.savefig(file, **how)
    return file.getvalue()


def _draw_lines(axes: Axes, title: str, lines: Sequence[Points], last: int) -> None:
    """Draw one panel, over the steps from 0 to ``last``."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    few = max(map(len, lines)) <= 30
    for points, colour, line in zip(lines, COLOURS, LINES, strict=False):
        marker = "." if few or len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=1.4, marker=marker)
    values = [value for points in lines for _, value in points if math.isfinite(value)]
    if title.endswith("loss") and values and 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _tick(value))
    axes.set(title=title, xlabel="step", xlim=(0, 1.02 * last))
    if title.endswith("per second") and values:
        axes.set_ylim(0, 1.05 * max(values))
    axes.grid(True)


def _tick(value: float) -> str:
    """At most four digits, never a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else np.format_float_positional(value, 4, fractional=False, trim="-")


def _draw_table(axes: Axes, runs: Sequence[ReportedRun]) -> None:
    """Draw the adapted models' main metrics: a row for each run, with a sample of its line."""
    columns = {"": ["\u2501\u2501" if line == "solid" else "\u254d\u254d" for line in LINES[: len(runs)]]}
    columns |= main_metrics(runs)
    widths = [max(map(len, (*title.split("\n"), *cells))) + 2 for title, cells in columns.items()]
    table = axes.table(
        [list(row) for row in zip(*columns.values(), strict=True)],
        colLabels=list(columns),
        colWidths=widths,
        cellLoc="left",
        colLoc="left",
        edges="open",
        bbox=(0, 0, min(1, sum(widths) / 120), 1),  # pyright: ignore[reportArgumentType]
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for row, colour in zip(range(len(runs)), COLOURS, strict=False):
        table[row + 1, 0].get_text().set_color(colour)
    axes.set_axis_off()
