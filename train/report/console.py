"""The output of a run: progress, tables of metrics, and the plot of its curves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jlora.files.drafts import drafts
from jlora.messages import table
from train.compute.processes import is_first
from train.compute.throughput import NOTABLE
from train.loop.state import Intervals


class Progress:
    """Training progress: a bar if stderr is a terminal, and a line on stdout for each record, unless both are
    the same terminal.

    Only the first process shows it. Use as a context manager: `advance` after every step, `show` after every record.

    Args:
      phase: the name of the training.
      intervals: of the training.
      done: the number of steps already done.
    """

    def __init__(self, phase: str, intervals: Intervals, done: int):
        self._phase, self._intervals, self._done = phase, intervals, done
        self._bar = tqdm(
            total=intervals.steps,
            initial=done,
            desc=phase,
            disable=None if is_first() else True,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| step {n_fmt} of {total_fmt}{postfix}",
        )
        self._plain = is_first() and (bool(self._bar.disable) or not sys.stdout.isatty())
        self._metrics = ""

    def __enter__(self) -> Progress:
        intervals, left = self._intervals, self._intervals.steps - self._done
        if left > 0:
            self.say(
                f"{left} of {intervals.steps} steps, {intervals.epoch} in an epoch; "
                f"logged every {intervals.log}, evaluated every {intervals.eval}"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def show(self, record: Mapping[str, Any], metrics: Sequence[str] = (), left: float | None = None) -> None:
        """Show a record.

        Skips the record at the end of an epoch if nothing was evaluated and other lines show the same.

        Args:
          metrics: the names of its values from an evaluation.
          left: the seconds until the end of training, if known.
        """
        if "epoch" in record and not metrics and self._intervals.log != self._intervals.epoch:
            return
        parts, measured = self._parts(record, left), [f"{name} {record[name]:.4f}" for name in metrics]
        self._metrics = "  ".join(measured) or self._metrics  # the bar keeps showing the newest ones
        if not self._bar.disable:
            self._bar.set_postfix_str("  ".join([*parts, self._metrics]).rstrip())
        width = len(str(self._intervals.steps))
        self.say("  ".join([f"step {record['step']:>{width}} of {self._intervals.steps}", *parts, *measured]))

    def _parts(self, record: Mapping[str, Any], left: float | None) -> list[str]:
        """The parts of a record on a line and the bar, besides its step and the evaluated metrics."""
        intervals = self._intervals
        epoch = f"epoch {-(-record['step'] // intervals.epoch)} of {intervals.steps // intervals.epoch}"
        whole = "epoch" in record
        parts = [f"{epoch} done" if whole else epoch, f"{'mean ' if whole else ''}loss {record['loss']:.4f}"]
        parts.append(f"lr {record['learning_rate']:.2e}")
        for name, unit in (("tokens_per_second", "tokens/s"), ("examples_per_second", "examples/s")):
            if name in record:
                parts.append(f"{record[name]:,.{0 if record[name] >= 10 else 1}f} {unit}")
                break
        if "loss_tokens_per_second" in record:
            parts[-1] += f" ({record['loss_tokens_per_second']:,.0f} with loss)"
        if "padding" in record:
            parts.append(f"padding {record['padding']:.0%}")
        if record.get("input", 0) >= NOTABLE:
            parts.append(f"input {record['input']:.0%}")
        return parts if left is None else [*parts, f"{_clock(left)} left"]

    def show_line(self, step: int, parts: Sequence[str], left: float | None = None) -> None:
        """Show a line of these parts after a step; ``left`` as for `show`."""
        parts = [*parts, f"{_clock(left)} left"] if left is not None else parts
        if not self._bar.disable:
            self._bar.set_postfix_str("  ".join(parts))
        self.say("  ".join([f"step {step:>{len(str(self._intervals.steps))}} of {self._intervals.steps}", *parts]))

    def say(self, line: str) -> None:
        """Print a line, unless the bar is on the same terminal."""
        if self._plain:
            tqdm.write(f"{self._phase}  {line}", file=sys.stdout)  # clears a bar on the same terminal first
            sys.stdout.flush()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def ending(summary: Mapping[str, Any]) -> str:
    """The reason for a run's end, and its kept step, as text."""
    kept, best = summary["kept_step"], summary["best_step"]
    text = f"ended at step {summary['steps']} of {summary['planned_steps']}: {summary['ended']}\n"
    text += f"kept: step {kept}, the {summary['kept']} one"
    if summary["kept_metric"] is not None:
        text += f", {summary['primary_metric']} {summary['kept_metric']:.4f}"
    if summary["kept"] == "last" and best is not None and summary["best_metric"] != summary["kept_metric"]:
        text += f" (step {best} had {summary['best_metric']:.4f}; --keep best keeps it)"
    return text


def comparison_table(summary: dict[str, Any]) -> str:
    """The primary metric of a run's models on every set of examples, and the numbers of differing predictions."""
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
        [labels[model][0], *(f"{metrics[name][primary]:.4f}" for name in sets), labels[model][1]]
        for model, metrics in summary["metrics"].items()
    ]
    if not differing:
        return table([primary, *sets], [row[:-1] for row in rows], right=range(1, 1 + len(sets)))
    return table([primary, *sets, ""], rows, right=range(1, 1 + len(sets)))


def metrics_line(metrics: dict[str, float]) -> str:
    """All metrics of one set of examples, as text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def draw_curves(path: Path, records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Draw the loss, and ``metrics`` of the records, over the steps of all phases, one after the other, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, measured = figure.subplots(1, 2)
    before, named = 0, set()
    for number, phase in enumerate(dict.fromkeys(record["phase"] for record in records)):
        of_phase = [record for record in records if record["phase"] == phase]
        # Records between the ends of epochs show the loss in more detail.
        lines = [record for record in of_phase if "epoch" not in record] or of_phase
        steps = [before + record["step"] for record in lines]
        loss.plot(steps, [record["loss"] for record in lines], color="black")
        for colour, name in enumerate(metrics):
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
    if all(name.endswith("accuracy") for name in metrics):
        measured.set(ylim=(0, 1.02))
    measured.legend()
    with drafts(path) as (draft,):
        figure.savefig(draft, dpi=120, format="png")
