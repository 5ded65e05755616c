"""What a run shows: progress, tables, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jlora._table import table


class Progress:
    """A progress bar on a terminal; elsewhere a plain line for every epoch that was evaluated.

    Use as a context manager: `advance` after every step, `show` after every epoch.
    """

    def __init__(self, phase: str, steps: int):
        self._phase = phase
        self._bar = tqdm(total=steps, desc=phase, unit="step", disable=None, dynamic_ncols=True)
        self._plain = bool(self._bar.disable)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show the figures of the epoch's record."""
        known = {"phase", "epoch", "step", "seconds", "learning_rate", "grad_norm", "accuracy"}
        figures = {name: f"{value:.3f}" for name, value in record.items() if name not in known}
        if not self._plain:
            self._bar.set_postfix(figures)
        elif len(figures) > 1:
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"{self._phase}  epoch {record['epoch']:3d}  {shown}  {record['seconds']:.1f} s", flush=True)


def accuracy_table(summary: dict[str, Any]) -> str:
    """A run's models on both domains, and how many predictions tell them apart."""
    differing, images = summary["differing_predictions"], sum(summary["test_images"].values())
    differ = f"of {images:,} predictions differ from"
    labels = {
        "base": ("base", ""),
        "adapted": (f"adapted ({summary['mode']})", ""),
        "merged": ("merged", f"{differing['merged_vs_adapted']} {differ} the adapted model's"),
        "detached": ("detached", f"{differing['detached_vs_base']} {differ} the base's"),
    }
    rows = [
        [label, *(f"{value:.4f}" for value in summary["accuracy"][model].values()), note]
        for model, (label, note) in labels.items()
    ]
    return table(["test accuracy", *summary["test_images"], ""], rows, right=range(1, 1 + len(summary["test_images"])))


def draw_curves(path: Path, records: Sequence[dict[str, Any]], domains: Sequence[str]) -> bool:
    """Draw loss and test accuracy over the epochs of all phases, one after the other, as a PNG.

    Returns:
      Whether it was drawn: False without matplotlib (the extra `plots`).
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = range(1, len(records) + 1)
    loss.plot(epochs, [record["loss"] for record in records], color="black")
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for domain in domains:
        points = [(epoch, record[domain]) for epoch, record in zip(epochs, records, strict=True) if domain in record]
        accuracy.plot(*zip(*points, strict=True), marker=".", label=domain)
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
    accuracy.legend()
    for epoch, (before, after) in enumerate(zip(records, records[1:], strict=False), start=1):
        if before["phase"] != after["phase"]:
            for axes in (loss, accuracy):
                axes.axvline(epoch + 0.5, color="gray", linestyle=":")
    figure.savefig(path, dpi=120)
    return True
