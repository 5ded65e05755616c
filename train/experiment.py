"""A run, from its configuration to its summary: trains adapters on a frozen base, and compares the models.

For a network trained from scratch this also demonstrates LoRA's equivalences: the merged model predicts the same as the
adapted one, and detaching the adapters restores the base.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jlora
from jlora import HEADS
from train.compute import processes
from train.compute.compilation_cache import compilation_cache
from train.compute.keys import random_key
from train.compute.processes import is_first, say
from train.config import TrainConfig
from train.job import Job, ideal_seconds, make_job, start_adapters
from train.loop.evaluate import Measure, evaluate_models, make_measure
from train.loop.loop import FitResult, Training, fit
from train.loop.run_files import RunFiles
from train.loop.stop import BEFORE, Stop, on_ctrl_c
from train.pretrain import Base, pretrain
from train.report import console, writers
from train.rundir.claim import ClaimedDirectory, claim
from train.rundir.records import Record
from train.summary import make_summary, print_start, print_summary


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and evaluate ``config``; print the progress and write the run directory.

    Resumes a stopped run. With several processes, each calls this, and the first one writes.

    Args:
      config: a valid configuration, as from `train.__main__.parse`.

    Returns:
      The summary, as in ``summary.json``; in processes other than the first, without speeds.

    Raises:
      ConfigError: if data, checkpoint, devices or run directory do not fit the configuration, or the training diverged.
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if the run was stopped.
    """
    with session(config) as stop:
        return _run(config, stop)


@contextlib.contextmanager
def session(config: TrainConfig) -> Iterator[Stop]:
    """What surrounds a run in this process: signals, other processes, compiled programs."""
    with Stop() as stop, on_ctrl_c(BEFORE):
        writers.check(config.log)
        processes.join(config.processes)
        stop.joined()
        with compilation_cache(config):
            yield stop


def _run(config: TrainConfig, stop: Stop) -> dict[str, Any]:
    began = time.perf_counter()
    job = make_job(config, stop.check)
    with claim(job.config, job.provenance) as directory:
        if directory.finished and not directory.extends:
            say(
                f"{directory} is finished: nothing is left to train. Pass more --fit.epochs to train it further, "
                "or another --run-dir to train it again"
            )
            directory.check_sums()
            return directory.read_summary()
        directory.begin(job.config, job.provenance)
        return _train(job, directory, stop, began)


def _train(job: Job, directory: ClaimedDirectory, stop: Stop, began: float) -> dict[str, Any]:
    print_start(job)
    with RunFiles(job.config, directory, str(job.plan), job.intervals(job.config.fit, job.examples)) as files:
        if files.note:
            say(f"{files.note}\n")
        if not files.state.step:
            files.begin()
        measure = make_measure(job.layout, job.network.forward, job.task, job.config.eval_batch_size, job.buckets, stop)
        base = frozen_base(job, directory.base, measure, files.log_base, stop)
        fitted = fit_adapters(job, base.params, measure, files, stop)
        with on_ctrl_c("stopped before the end of the final evaluation; the same command repeats it"):
            jlora.save(directory.adapters, job.layout.to_host(fitted.adapters))
            metrics, differing = evaluate_all(job, base.params, fitted.adapters, measure)
            summary = {
                **make_summary(job, base, fitted, files.records.read(), keep_best=files.keep_best),
                "metrics": metrics,
                "differing_predictions": differing,
                "run_dir": str(directory),
                "seconds": round(time.perf_counter() - began, 2),
            }
            if is_first():
                shown = [metric.name for metric in job.primary_metrics]
                console.draw_curves(directory.curves, files.records.read(), shown)
                directory.finish(summary)
                print_summary(summary)
    return summary


def frozen_base(job: Job, kept: Path, measure: Measure, log: Callable[[Record], None], stop: Stop) -> Base:
    """The frozen base: a checkpoint's parameters, or a network trained from scratch; ``kept``, ``log`` and ``stop`` are
    as for `train.pretrain.pretrain`."""
    load = job.network.load
    if load is None:
        base = pretrain(job, kept, measure, log, stop)
        say(f"base: {'trained and cached at' if base.trained else 'loaded from'} {base.source}")
        return base
    # Initializes a head that the checkpoint lacks, if it is trained.
    new = any(re.search(pattern, path) for pattern in HEADS for path in job.plan)
    key = random_key(job.config.seed, "head") if new else None
    params = job.layout.place_base(job.shapes, lambda shardings: load(key, shardings))
    return Base(params, str(job.network.source), trained=False)


def fit_adapters(job: Job, base: Any, measure: Measure, files: RunFiles, stop: Stop) -> FitResult:
    """Train adapters on the frozen parameters ``base``, from the point where the run stopped."""

    def evaluate(adapters: dict[str, Any]) -> dict[str, float]:
        found = {name: job.task.metrics(measure(base, adapters, examples)) for name, examples in job.test.items()}
        return {f"{name}_{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}

    training = Training(
        job,
        "fit",
        job.examples,
        start=lambda params: start_adapters(job.config, job.network, params, job.plan),
        evaluate=evaluate,
        metric=job.primary_metrics[-1],
        log=files.log,
        ideal_seconds=ideal_seconds(job),
    )
    return fit(training, base, files=files, stop=stop)


def evaluate_all(
    job: Job, base: Any, adapters: dict[str, Any], measure: Measure
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, int]]:
    """The metrics of the base and the adapted model, by model and set of examples, and differing predictions.

    A network trained from scratch is also evaluated merged, and detached. A checkpoint may be too large for a
    second copy in memory; ``python -m train export`` merges it leaf by leaf.
    """
    models = {"base": (base, None), "adapted": (base, adapters)}
    pairs = {}
    if job.network.load is None:
        merged = job.layout.call(jlora.merge, base, adapters)
        detached = job.layout.call(lambda base, adapters: jlora.detach(jlora.attach(base, adapters))[0], base, adapters)
        models |= {"merged": (merged, None), "detached": (detached, None)}
        pairs = {"merged_vs_adapted": ("merged", "adapted"), "detached_vs_base": ("detached", "base")}
    metrics, differing = evaluate_models(job.task, models, measure, job.test)
    return metrics, {name: differing(*pair) for name, pair in pairs.items()}
