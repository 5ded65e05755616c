"""The whole story: a base is frozen, adapters are trained on it, and what they are worth is measured.

For a network trained from scratch it also shows LoRA's promise: the merged model predicts what the adapted one
predicts, and the base is still there once the adapters are detached. A checkpoint is merged by ``python -m train
export``, leaf by leaf, so that training never holds two copies of it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import jlora
from jlora import HEADS
from train.compute import flops, processes, throughput
from train.compute.keys import random_key
from train.compute.processes import is_first, say
from train.compute.step import init_state, make_step
from train.config import TrainConfig
from train.data.batches import batch_of, size
from train.job import Job, make_job, start_adapters
from train.loop.evaluate import Measure, evaluate_models, make_measure
from train.loop.loop import FitResult, Training, fit
from train.loop.run_files import RunFiles
from train.loop.stop import BEFORE, Stop, on_ctrl_c
from train.networks.registry import make_network
from train.pretrain import Base, base
from train.report import console, writers
from train.report import examples as look
from train.rundir import files
from train.rundir.directory import finish, open_run_dir, read_summary
from train.tasks.labels import counts_table


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and measure as ``config`` says; print what happens and write the run directory.

    ``config`` passes `TrainConfig.check`, as those of the command line do.

    A run that was stopped goes on where it was. With several processes each calls this, and the first one writes.

    Returns:
      The summary, as written to ``summary.json``; in other processes than the first it has no speeds.

    Raises:
      ConfigError: if the configuration does not fit the data or the devices, or the training diverged.
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if it was asked to stop, and did.
    """
    with Stop() as stop, on_ctrl_c(BEFORE):
        return _run(config, stop)


def _run(config: TrainConfig, stop: Stop) -> dict[str, Any]:
    writers.check(config.log)
    processes.join(config.processes)
    stop.joined()
    begun = time.perf_counter()

    job = make_job(config, stop.check)
    config = job.config
    place = open_run_dir(config, job.provenance)
    if place.finished and not place.further:
        say(
            f"{place.path} is finished: nothing is left to train. Pass more --fit.epochs to train it further, or "
            "another --run-dir to train it again"
        )
        return read_summary(place.path)
    say(f"{config.name}, mode {config.mode}, seed {config.seed}, {job.layout}\n\n{job.plan}\n")
    say("".join(f"data.{name}: {provenance.describe()}\n" for name, provenance in job.data.items()))
    if job.label_counts:
        say(f"{counts_table(job.label_counts, getattr(config.task, 'class_weights', None))}\n")
    for name, count in job.blank_images.items():
        say(f"{name}: {count:,} images have one colour only\n")
    if (example := look.first(job.task, job.examples)) is not None:
        say(f"{example}\n")
    if config.compute.layout == "jit" and (idle := jax.device_count() - job.layout.devices):
        say(f"{idle} devices are idle: --compute.layout mesh uses them all\n")

    with RunFiles(config, place, str(job.plan), job.intervals(config.fit, job.examples)) as kept:
        if kept.state.step:
            say(f"{kept.note}\n")
        else:
            kept.begin()
        measure = make_measure(job.layout, job.network.forward, job.task, config.eval_batch_size, job.buckets, stop)
        start = frozen(job, measure, kept, stop)
        fitted = trained(job, start, measure, kept, stop)
        with on_ctrl_c("stopped before the final evaluation was done; the same command finishes it"):
            jlora.save(kept.path / "adapters", job.layout.to_host(fitted.adapters))
            summary = summarize(job, start, fitted, measure, kept)
            summary["seconds"] = round(time.perf_counter() - begun, 2)
            if is_first():
                told(job, summary, kept)
    return summary


def frozen(job: Job, measure: Measure, kept: RunFiles, stop: Stop) -> Base:
    """The base, which stays as it is: a checkpoint's parameters, or a network trained from scratch."""
    if job.network.load is None:
        start = base(job, measure, kept.log_base, stop)
        say(f"base: {'taken from' if start.cached else 'cached at'} {start.path}")
        return start
    load = job.network.load
    # A head that the checkpoint lacks may start anew if it is going to be trained.
    new = any(re.search(pattern, path) for pattern in HEADS for path in job.plan)
    key = random_key(job.config.seed, "head") if new else None
    return Base(job.layout.place_base(job.shapes, lambda shardings: load(key, shardings)), None, cached=False)


def trained(job: Job, start: Base, measure: Measure, kept: RunFiles, stop: Stop) -> FitResult:
    """The adapters that are kept, and how their training ended."""

    def evaluate(adapters: dict[str, Any]) -> dict[str, float]:
        found = {name: job.task.metrics(measure(start.params, adapters, one)) for name, one in job.test.items()}
        return {f"{name}_{metric}": value for name, all_of in found.items() for metric, value in all_of.items()}

    training = Training(
        job,
        "fit",
        job.examples,
        start=lambda params: start_adapters(job.config, job.network, params, job.plan),
        evaluate=evaluate,
        metric=job.primary_metric(list(job.test)[-1]),
        log=kept.log,
        ideal_seconds=ideal_seconds(job),
    )
    return fit(training, start.params, files=kept, stop=stop)


def ideal_seconds(job: Job) -> Callable[[tuple[int, ...]], float]:
    """For a batch's shape, the time of a step at the devices' peak; 0 on devices whose peak is not known.

    Counted are the products of the forward and the backward pass, whatever `ComputeConfig.remat` computes again.
    """
    peak, config = flops.peak(jax.devices()[0]), job.config
    if peak is None:
        return lambda _: 0.0
    network = make_network(dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="none")))
    tx = optax.identity()
    step = make_step(network.forward, job.task, tx, optax.constant_schedule(0.0))
    state = jax.eval_shape(lambda base: init_state(tx, start_adapters(config, network, base, job.plan)), job.shapes)

    @functools.cache
    def seconds(shape: tuple[int, ...]) -> float:
        batch = batch_of(job.examples, np.zeros(shape[0], np.int64), shape[1:])
        return flops.count(step, state, job.shapes, batch, jax.random.key(0)) / (peak * job.layout.devices)

    return seconds


def summarize(job: Job, start: Base, fitted: FitResult, measure: Measure, kept: RunFiles) -> dict[str, Any]:
    """The summary, with the metrics of all models; merged parameters of a network trained from scratch are saved."""
    config, task, layout, adapters, state = job.config, job.task, job.layout, fitted.adapters, fitted.state
    models = {"base": (start.params, None), "adapted": (start.params, adapters)}
    if job.network.load is None:
        merged = layout.call(jlora.merge, start.params, adapters)
        plain = layout.to_host(merged)
        if is_first():
            files.save_tree(kept.path / "merged", plain)
        bare = layout.call(lambda params, adapters: jlora.detach(jlora.attach(params, adapters))[0], *models["adapted"])
        models |= {"merged": (merged, None), "detached": (bare, None)}
    measured, differing = evaluate_models(task, models, measure, job.test)
    pairs = (("merged", "adapted"), ("detached", "base"))
    return {
        "name": config.name,
        "mode": config.mode,
        "seed": config.seed,
        "primary": task.primary,
        "metrics": measured,
        "differing_predictions": {f"{one}_vs_{two}": differing(one, two) for one, two in pairs if one in models},
        "examples": {name: size(examples) for name, examples in job.test.items()},
        "data": job.provenance,
        "labels": job.label_counts,
        "blank_images": job.blank_images,
        "cut": {name: cut._asdict() for name, cut in job.cuts.items()},
        "steps": state.step,
        "planned_steps": job.intervals(config.fit, job.examples).steps,
        "ended": fitted.ended,
        "primary_metric": job.primary_metric(list(job.test)[-1]).name,
        "kept": "best" if kept.keep_best else "last",
        "kept_step": fitted.kept_step,
        "kept_metric": fitted.kept_metric,
        "best_step": state.best_step,
        "best_metric": state.best_metric,
        "epochs_planned": state.planned_epochs,
        "trainable": job.plan.trainable,
        "total": job.plan.total,
        "base": {"path": str(start.path or job.network.source), "cached": start.cached},
        "run_dir": str(kept.path),
        "layout": str(layout),
        **throughput.speed(kept.records.read()),
        "peak_memory_bytes": throughput.peak_memory(),
        "training_seconds": round(state.seconds, 2),
    }


def told(job: Job, summary: dict[str, Any], kept: RunFiles) -> None:
    """Draw and print it, and write the summary last: a run with one is finished."""
    shown = [f"{name}_{job.task.primary}" for name in job.test]
    console.draw_curves(kept.path / "curves.png", kept.records.read(), shown)
    finish(kept.path, summary)
    print(f"\n{console.ending(summary)}\n\n{console.comparison_table(summary)}\n")
    for name in job.test:
        print(f"adapted, {name}: {console.figures_line(summary['metrics']['adapted'][name])}")
    print(f"\n{throughput.line(summary)}\nwritten to {kept.path} in {summary['seconds']:.1f} s")
