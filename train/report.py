"""What a run shows: progress, tables, curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jlora._table import table
from train.processes import is_first, say

QUIET_SECONDS = 20
"""Where there is no terminal: how long to train without a line."""


class Progress:
    """A progress bar on a terminal; elsewhere a plain line for every measurement, and in long epochs between.

    Of several processes the first one shows it.

    Use as a context manager: `advance` after every step, `show` after every record.

    Args:
      phase: the name of the training.
      steps: how many there are.
      done: how many were done before.
      metric: the one that is shown.
    """

    def __init__(self, phase: str, steps: int, done: int, metric: str):
        self._phase, self._steps, self._step, self._metric = phase, steps, done, metric
        hidden = None if is_first() else True
        self._bar = tqdm(total=steps, initial=done, desc=phase, unit="step", disable=hidden, dynamic_ncols=True)
        self._plain = bool(self._bar.disable)
        self._spoke = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()
        self._step += 1
        if self._plain and time.perf_counter() - self._spoke > QUIET_SECONDS:
            self._say(f"step {self._step} of {self._steps}")

    def show(self, record: dict[str, Any]) -> None:
        """Show the loss of a record, and the metric on every set on which it was measured."""
        figures = {"loss": record["loss"]} | {n: v for n, v in record.items() if n.endswith(f"_{self._metric}")}
        figures = {name: f"{value:.3f}" for name, value in figures.items()}
        if not self._plain:
            self._bar.set_postfix(figures)
        elif len(figures) > 1:
            where = f"epoch {record['epoch']:3d}" if "epoch" in record else f"step {record['step']}"
            took = f"  {record['seconds']:.1f} s" if "seconds" in record else ""
            self._say(f"{where}  {'  '.join(f'{name} {value}' for name, value in figures.items())}{took}")

    def _say(self, line: str) -> None:
        say(f"{self._phase}  {line}")
        self._spoke = time.perf_counter()


def comparison_table(summary: dict[str, Any]) -> str:
    """A run's models on every set of examples, by the metric that counts, and how many predictions tell them apart."""
    sets, primary = summary["examples"], summary["primary"]
    differ = f"of {sum(sets.values()):,} predictions differ from"
    differing = summary["differing_predictions"]
    labels = {
        "base": ("base", ""),
        "adapted": (f"adapted ({summary['mode']})", ""),
        "merged": ("merged", f"{differing.get('merged_vs_adapted')} {differ} the adapted model's"),
        "detached": ("detached", f"{differing.get('detached_vs_base')} {differ} the base's"),
    }
    rows = [
        [labels[model][0], *(f"{figures[name][primary]:.4f}" for name in sets), labels[model][1]]
        for model, figures in summary["metrics"].items()
    ]
    if not differing:
        return table([primary, *sets], [row[:-1] for row in rows], right=range(1, 1 + len(sets)))
    return table([primary, *sets, ""], rows, right=range(1, 1 + len(sets)))


def figures_line(figures: dict[str, float]) -> str:
    """All metrics of one set of examples, for a person."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


def draw_curves(path: Path, records: Sequence[dict[str, Any]], figures: Sequence[str]) -> bool:
    """Draw the loss, and ``figures`` of the records, over the steps of all phases, one after the other, as a PNG.

    Returns:
      Whether it was drawn: False without matplotlib (the extra `plots`).
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, measured = figure.subplots(1, 2)
    before, named = 0, set()
    for number, phase in enumerate(dict.fromkeys(record["phase"] for record in records)):
        of_phase = [record for record in records if record["phase"] == phase]
        # Where there are lines between the epochs' ends, they tell the loss in more detail.
        lines = [record for record in of_phase if "epoch" not in record] or of_phase
        steps = [before + record["step"] for record in lines]
        loss.plot(steps, [record["loss"] for record in lines], color="black")
        for colour, name in enumerate(figures):
            points = [(before + record["step"], record[name]) for record in of_phase if name in record]
            if points:
                label = None if name in named else name.replace("_", " ")
                measured.plot(*zip(*points, strict=True), marker=".", color=f"C{colour}", label=label)
                named.add(name)
        if number:
            for axes in (loss, measured):
                axes.axvline(before, color="gray", linestyle=":")
        before = max(before + record["step"] for record in of_phase)
    loss.set(xlabel="step", ylabel="training loss", yscale="log", xlim=(0, before))
    measured.set(xlabel="step", xlim=(0, before * 1.02))
    if all(name.endswith("accuracy") for name in figures):
        measured.set(ylim=(0, 1.02))
    measured.legend()
    figure.savefig(path, dpi=120)
    return True
