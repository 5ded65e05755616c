"""The output at the start and the end of a run, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from train.compute import throughput
from train.compute.processes import say
from train.data.batches import size
from train.job import Job
from train.loop.loop import FitResult
from train.pretrain import Base
from train.report import console
from train.report import examples as shown
from train.rundir.records import Record
from train.tasks.labels import counts_table


def print_start(job: Job) -> None:
    """Print the adapted weights and the data, before training starts."""
    config = job.config
    say(f"{config.name}, mode {config.mode}, seed {config.seed}, {job.layout}\n\n{job.plan}\n")
    say("".join(f"data.{name}: {provenance.describe()}\n" for name, provenance in job.data.items()))
    if job.label_counts:
        say(f"{counts_table(job.label_counts, getattr(config.task, 'class_weights', None))}\n")
    for name, count in job.blank_images.items():
        say(f"{name}: {count:,} images have a single colour\n")
    if (example := shown.first(job.task, job.examples)) is not None:
        say(f"{example}\n")
    if config.compute.layout == "jit" and (idle := jax.device_count() - job.layout.devices):
        say(f"{idle} devices are idle: --compute.layout mesh uses them all\n")


def make_summary(
    job: Job, base: Base, fitted: FitResult, records: Sequence[Record], *, keep_best: bool
) -> dict[str, Any]:
    """The summary of a training, without the final metrics."""
    config, state = job.config, fitted.state
    return {
        "name": config.name,
        "mode": config.mode,
        "seed": config.seed,
        "primary": job.task.primary,
        "examples": {name: size(examples) for name, examples in job.test.items()},
        "data": job.provenance,
        "labels": job.label_counts,
        "blank_images": job.blank_images,
        "cut": {name: cut._asdict() for name, cut in job.cuts.items()},
        "steps": state.step,
        "planned_steps": job.intervals(config.fit, job.examples).steps,
        "ended": fitted.ended,
        "primary_metric": job.primary_metrics[-1].name,
        "kept": "best" if keep_best else "last",
        "kept_step": fitted.kept_step,
        "kept_metric": fitted.kept_metric,
        "best_step": state.best_step,
        "best_metric": state.best_metric,
        "epochs_planned": state.planned_epochs,
        "trainable": job.plan.trainable,
        "total": job.plan.total,
        "base": {
            "path": base.source,
            "cached": job.network.load is None and not base.trained,
            "scheme": job.network.scheme,
        },
        "layout": str(job.layout),
        **throughput.speed(records),
        "peak_memory_bytes": throughput.peak_memory(),
        "training_seconds": round(state.seconds, 2),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print how the run ended and the final metrics."""
    print(f"\n{console.ending(summary)}\n\n{console.comparison_table(summary)}\n")
    for name, metrics in summary["metrics"]["adapted"].items():
        print(f"adapted, {name}: {console.metrics_line(metrics)}")
    print(f"\n{throughput.line(summary)}\nwritten to {summary['run_dir']} in {summary['seconds']:.1f} s")
