"""The whole story: a base is frozen, adapters are trained on it, and what they are worth is measured.

For a network trained from scratch it also shows LoRA's promise: the merged model predicts what the adapted one
predicts, and the base is still there once the adapters are detached. A checkpoint is merged by ``python -m train
export``, leaf by leaf, so that training never holds two copies of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import jlora
from jlora._paths import named_leaves
from jlora.config import HEADS
from train import flops, gauges, processes, report, store, writers
from train.base import Base, base
from train.batches import Examples, batch_of, lengths, quarters, size
from train.checkpoints import Checkpoints
from train.checks import validate, validate_for
from train.config import ConfigError, TrainConfig
from train.data import Table, load
from train.evaluate import compare, make_measure
from train.loop import Saving, Training, fit, random_key
from train.networks import Network, check_tokens, make_network, what_to_train
from train.parallel import Jit, Layout, make_layout
from train.processes import is_first, say
from train.progress import Pace, Position
from train.records import Record, Records
from train.rundir import RunDir, open_run_dir
from train.step import init_state, make_step
from train.stop import Stop
from train.tasks import Task, make_task, resolved


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and measure as ``config`` says; print what happens and write the run directory.

    A run that was stopped goes on where it was. With several processes each calls this, and the first one writes.

    Returns:
      The summary, as written to ``summary.json``; in other processes than the first without figures.

    Raises:
      ConfigError: if the configuration cannot be run, or the training diverged.
      CheckpointError: if a checkpoint cannot be written or read.
      Stopped: if it was asked to stop, and did.
    """
    validate(config)
    writers.check(config.log)
    processes.join(config.processes)
    begun = time.perf_counter()

    # The data, the network, where it is computed, and what of it will be adapted.
    tables = load(config.data, config.cache_dir)
    config = resolved(config, tables)
    network = make_network(config)
    task = make_task(config, network)
    train, test = encoded(task, tables)
    check_tokens(network, train, test)
    learnt = train[list(train)[-1]]
    validate_for(config, size(learnt))
    layout = make_layout(config, network.rules)
    buckets = bucket_lengths(config, train, test)
    uses, plan = plan_of(config, network, task.inputs(batch_of(learnt, np.arange(1), buckets)))

    place = open_run_dir(config)
    if place.finished:
        say(f"{place.path} is finished: nothing is left to train. Pass another --run-dir to train it again")
        return json.loads((place.path / "summary.json").read_text())
    say(f"{config.name}, mode {config.mode}, seed {config.seed}, {layout}\n\n{plan}\n")
    if isinstance(layout, Jit) and jax.device_count() > 1:
        say(f"{jax.device_count() - 1} devices are idle: --compute.layout mesh uses them all\n")
    with Stop() as stop, Kept(config, place, layout, str(plan)) as kept:
        return _run(config, network, task, layout, train, test, buckets, uses, plan, kept, stop, begun)


def _run(
    config: TrainConfig,
    network: Network,
    task: Task,
    layout: Layout,
    train: Mapping[str, Examples],
    test: Mapping[str, Examples],
    buckets: Sequence[int],
    uses: Mapping[str, jlora.WeightUse],
    plan: jlora.Plan,
    kept: Kept,
    stop: Stop,
    begun: float,
) -> dict[str, Any]:
    measured = make_measure(layout, network.forward, task, config.eval_batch_size, buckets, stop)

    def measure(params: Any, adapters: Any, *sets: str) -> dict[str, float]:
        found = {name: task.metrics(measured(params, adapters, test[name])) for name in sets}
        return {f"{name}_{metric}": value for name, figures in found.items() for metric, value in figures.items()}

    sign = 1 if task.higher_is_better else -1

    # The base, which stays as it is from here on.
    first, last = list(train)[0], list(test)[-1]
    if network.load is not None:
        start = Base(checkpoint_params(config, network, layout, plan), None, cached=False)
    else:
        start = base(
            network,
            task,
            layout,
            train[first],
            config,
            lambda params, adapters: measure(params, adapters, first),
            (f"{first}_{task.primary}", sign),
            kept.log_base,
            stop,
        )
        say(f"base: {'taken from' if start.cached else 'cached at'} {start.path}")

    # The adapters.
    learnt = train[list(train)[-1]]
    training = Training(
        phase="fit",
        forward=network.forward,
        task=task,
        examples=learnt,
        config=config.fit,
        learning_rate=getattr(config.learning_rate, config.mode),
        seed=config.seed,
        pace=pace_of(config, size(learnt)),
        evaluate=lambda adapters: measure(start.params, adapters, *test),
        figure=(f"{last}_{task.primary}", sign),
        log=kept.records.write,
        buckets=buckets,
        accumulate=config.compute.accumulate,
        ideal_seconds=ideal_seconds(config, task, layout, learnt, uses),
    )
    adapters, position = fit(
        training,
        layout,
        start.params,
        lambda params: start_adapters(config, network, params, uses),
        saving=kept.saving,
        stop=stop,
    )
    jlora.save(kept.path / "adapters", layout.to_host(adapters))

    # The figures.
    models = {"base": (start.params, None), "adapted": (start.params, adapters)}
    if network.load is None:
        merged = layout.call(jlora.merge, start.params, adapters)
        plain = layout.to_host(merged)
        if is_first():
            store.save_tree(kept.path / "merged", plain)
        bare = layout.call(lambda params, adapters: jlora.detach(jlora.attach(params, adapters))[0], *models["adapted"])
        models |= {"merged": (merged, None), "detached": (bare, None)}
    figures, differing = compare(task, models, measured, test)
    pairs = (("merged", "adapted"), ("detached", "base"))
    records = kept.records.read()
    summary = {
        "name": config.name,
        "mode": config.mode,
        "seed": config.seed,
        "primary": task.primary,
        "metrics": figures,
        "differing_predictions": {f"{one}_vs_{two}": differing(one, two) for one, two in pairs if one in models},
        "examples": {name: size(examples) for name, examples in test.items()},
        "steps": position.step,
        "kept_step": (position.best_step if config.keep == "best" else None) or position.step,
        "trainable": plan.trainable,
        "total": plan.total,
        "base": {"path": str(start.path or network.source), "cached": start.cached},
        "run_dir": str(kept.path),
        "layout": str(layout),
        **gauges.speed(records),
        "peak_memory_bytes": gauges.peak_memory(),
        "training_seconds": round(position.seconds, 2),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    if not is_first():
        return summary
    shown = [f"{name}_{task.primary}" for name in test]
    drawn = report.draw_curves(kept.path / "curves.png", records, shown)
    store.write_json(kept.path / "summary.json", summary)
    print(f"\n{report.comparison_table(summary)}\n")
    for name in test:
        print(f"adapted, {name}: {report.figures_line(figures['adapted'][name])}")
    print(f"\n{gauges.line(summary)}\nwritten to {kept.path} in {summary['seconds']:.1f} s")
    if not drawn:
        print("curves.png needs matplotlib: pip install -e '.[plots]'")
    return summary


class Kept:
    """What is kept of a run while it trains: records and checkpoints.

    Attributes:
      path: the run directory.
      records: its metrics.
      saving: its checkpoints, and where the training goes on.
    """

    def __init__(self, config: TrainConfig, place: RunDir, layout: Layout, plan: str):
        self.path, self._lock = place.path, place.lock
        checkpoints = Checkpoints(place.path / "checkpoints", config.save, keep_best=config.keep == "best")
        position = _resumed(config, checkpoints)
        self._resumed = position.step > 0
        if self._resumed:
            say(f"going on with {place.path} after step {position.step}\n")
        identity = store.to_json(config)
        self._writers = writers.open_writers(config.log if is_first() else (), place.path, identity, position.step + 1)
        self.records = Records(place.path / "metrics.jsonl", position.metrics_bytes, self._writers.write)
        self.saving = Saving(
            checkpoints, config.save, position, identity, self.records.sync, keep_best=config.keep == "best"
        )
        if is_first():
            (place.path / "plan.txt").write_text(plan + "\n")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writers.close(failed=error is not None)
        self.saving.checkpoints.close()
        if self._lock is not None:
            self._lock.release()

    def log_base(self, record: Record) -> None:
        """Keep a record of the base's training; a run that goes on has them."""
        if not self._resumed:
            self.records.write(record)


def _resumed(config: TrainConfig, checkpoints: Checkpoints) -> Position:
    """Where the training goes on.

    Raises:
      ConfigError: if there is no checkpoint of the step that the configuration asks for.
      CheckpointError: if the checkpoint cannot be read.
    """
    steps = checkpoints.steps()
    if not isinstance(config.resume, int):
        return checkpoints.position(steps[-1]) if steps else Position()
    if config.resume not in (0, *steps):
        raise ConfigError(
            f"resume: got step {config.resume}, and there are checkpoints of {', '.join(map(str, steps)) or 'no step'};"
            " pass one of these, 0 to begin anew, or --resume auto for the newest"
        )
    position = checkpoints.position(config.resume) if config.resume else Position()
    checkpoints.delete_after(config.resume)
    return position


def pace_of(config: TrainConfig, examples: int) -> Pace:
    """The pace of the training on so many examples."""
    return Pace.of(
        config.fit.epochs,
        examples // config.fit.batch_size,
        log_every=config.log_every,
        eval_every=config.eval_every,
        eval_every_steps=config.eval_every_steps,
    )


def checkpoint_params(config: TrainConfig, network: Network, layout: Layout, plan: jlora.Plan) -> Any:
    """A checkpoint's parameters, at their places. A head that it lacks may start anew if it is going to be trained."""
    assert network.load is not None
    load = network.load
    trained = any(re.search(pattern, path) for pattern in HEADS for path in plan)
    key = random_key(config.seed, "head") if trained else None
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return layout.place_base(shapes, lambda shardings: load(key, shardings))


def ideal_seconds(
    config: TrainConfig, task: Task, layout: Layout, examples: Examples, uses: Mapping[str, jlora.WeightUse]
) -> Callable[[tuple[int, ...]], float]:
    """For a batch's shape, the time of a step at the devices' peak; 0 on devices whose peak is not known.

    Counted are the products of the forward and the backward pass, whatever `ComputeConfig.remat` computes again.
    """
    peak = flops.peak(jax.devices()[0])
    if peak is None:
        return lambda _: 0.0
    network = make_network(dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="none")))
    step = make_step(network.forward, task, optax.identity(), optax.constant_schedule(0.0))
    base = jax.eval_shape(network.init, jax.random.key(0))

    @functools.cache
    def seconds(shape: tuple[int, ...]) -> float:
        key = jax.random.key(0)
        state = jax.eval_shape(
            lambda base: init_state(optax.identity(), start_adapters(config, network, base, uses)), base
        )
        rows = np.zeros(shape[0], np.int64)
        return flops.count(step, state, base, batch_of(examples, rows, shape[1:]), key) / (peak * layout.devices)

    return seconds


def encoded(task: Task, tables: Mapping[str, Table]) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Training and validation examples by the name of their domain; where there is one, it is ``validation``."""
    train, test = task.encode(tables["train"]), task.encode(tables["validation"])
    return train, {name or "validation": examples for name, examples in test.items()}


def bucket_lengths(config: TrainConfig, *sets: Mapping[str, Examples]) -> tuple[int, ...]:
    """The lengths to which batches of texts are padded: those configured, as far as the longest example needs them."""
    found = [long for examples in sets for one in examples.values() if (long := lengths(one)) is not None]
    if not found:
        return ()
    most = getattr(config.task, "max_length", 0)
    longest = max(int(long.max()) for long in found)
    wanted = tuple(sorted(config.data.buckets or quarters(most)))
    if wanted[-1] < longest:
        wanted = (*wanted, longest)
    return tuple(bucket for i, bucket in enumerate(wanted) if i == 0 or wanted[i - 1] < longest)


def plan_of(
    config: TrainConfig, network: Network, inputs: Mapping[str, Any]
) -> tuple[Mapping[str, jlora.WeightUse], jlora.Plan]:
    """How the network uses its weights, and the plan that follows.

    Shapes are all that this needs: what does not fit the model is refused before anything is read or trained.
    """
    params = jax.eval_shape(network.init, random_key(config.seed, "model"))
    uses = jlora.trace(network.forward, params, inputs)
    try:
        return uses, jlora.plan(params, what_to_train(config), uses)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def start_adapters(
    config: TrainConfig, network: Network, params: Any, uses: Mapping[str, jlora.WeightUse]
) -> dict[str, Any]:
    """Fresh adapters; with the mode ``head``, a head that has learnt nothing."""
    adapters: dict[str, Any] = jlora.init(random_key(config.seed, "adapters"), params, what_to_train(config), uses)
    if config.mode != "head":
        return adapters
    drawn, _ = named_leaves(network.init(random_key(config.seed, "head")))
    return {path: drawn[path].astype(value.dtype) for path, value in adapters.items()}
