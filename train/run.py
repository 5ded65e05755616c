"""The whole story: a base is frozen, adapters are trained on it, and what they are worth is measured.

For a network trained from scratch it also shows LoRA's promise: the merged model predicts what the adapted one
predicts, and the base is still there once the adapters are detached. A checkpoint is merged by ``python -m train
export``, leaf by leaf, so that training never holds two copies of it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from jlora._paths import named_leaves
from jlora.config import HEADS
from train import report, store
from train.base import Base, base
from train.batches import Examples, batch_of, lengths, quarters, size
from train.checks import validate, validate_for
from train.config import ConfigError, TrainConfig
from train.data import Table, load
from train.evaluate import Measure, compare, make_measure
from train.loop import Record, fit, random_key
from train.networks import Network, check_tokens, make_network, what_to_train
from train.tasks import Task, make_task, resolved


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and measure as ``config`` says; print what happens and write the run directory.

    Returns:
      The summary, as written to ``summary.json``.

    Raises:
      ConfigError: if the configuration cannot be run.
    """
    started = time.perf_counter()
    validate(config)

    # The data, the network, and what of it will be adapted.
    tables = load(config.data, config.cache_dir)
    config = resolved(config, tables)
    network = make_network(config)
    task = make_task(config, network)
    train, test = encoded(task, tables)
    check_tokens(network, train, test)
    learnt = train[list(train)[-1]]
    validate_for(config, size(learnt))
    buckets = bucket_lengths(config, train, test)
    uses, plan = plan_of(config, network, task.inputs(batch_of(learnt, np.arange(1), buckets)))
    run_dir = store.make_run_dir(config)
    print(f"{config.name}, mode {config.mode}, seed {config.seed}\n\n{plan}\n")

    plain = make_measure(network.forward, task, config.eval_batch_size, buckets)
    attached = make_measure(jlora.lora(network.forward), task, config.eval_batch_size, buckets)

    def measure(tree: Any, *sets: str) -> dict[str, float]:
        found = {name: task.metrics(attached(tree, test[name])) for name in sets}
        return {f"{name}_{metric}": value for name, figures in found.items() for metric, value in figures.items()}

    def log(record: Record) -> None:
        store.append_jsonl(run_dir / "metrics.jsonl", record)

    # The base, which stays as it is from here on.
    first = list(train)[0]
    if network.load is not None:
        # A head that the checkpoint lacks may start anew if it is going to be trained.
        trained = any(re.search(pattern, path) for pattern in HEADS for path in plan)
        start = Base(network.load(random_key(config.seed, "head") if trained else None), [], None, cached=False)
    else:
        start = base(network, task, train[first], config, lambda tree: measure(tree, first), log)
        print(f"base: {'taken from' if start.cached else 'cached at'} {start.path}")

    # The adapters.
    adapters = start_adapters(config, network, start.params, uses)
    kept = _Kept(config, task, f"{list(test)[-1]}_{task.primary}", run_dir / "adapters")
    _, records = fit(
        network.forward,
        task,
        start.params,
        adapters,
        learnt,
        config.fit,
        phase="fit",
        learning_rate=getattr(config.learning_rate, config.mode),
        seed=config.seed,
        eval_every=config.eval_every,
        evaluate=lambda tree: measure(tree, *test),
        log=log,
        buckets=buckets,
        on_eval=kept.look,
    )
    adapters = kept.adapters

    # The figures.
    models: dict[str, tuple[Measure, Any]] = {
        "base": (plain, start.params),
        "adapted": (attached, jlora.attach(start.params, adapters)),
    }
    if network.load is None:
        merged = jax.jit(jlora.merge)(start.params, adapters)
        store.save_tree(run_dir / "merged", merged)
        models |= {"merged": (plain, merged), "detached": (plain, jlora.detach(models["adapted"][1])[0])}
    figures, differing = compare(task, models, test)
    drawn = report.draw_curves(
        run_dir / "curves.png", [*start.records, *records], [f"{name}_{task.primary}" for name in test]
    )
    pairs = (("merged", "adapted"), ("detached", "base"))
    summary = {
        "name": config.name,
        "mode": config.mode,
        "seed": config.seed,
        "primary": task.primary,
        "metrics": figures,
        "differing_predictions": {f"{one}_vs_{two}": differing(one, two) for one, two in pairs if one in models},
        "examples": {name: size(examples) for name, examples in test.items()},
        "kept_epoch": kept.epoch,
        "trainable": plan.trainable,
        "total": plan.total,
        "base": {"path": str(start.path or network.source), "cached": start.cached},
        "run_dir": str(run_dir),
        "seconds": round(time.perf_counter() - started, 2),
    }
    store.write_json(run_dir / "summary.json", summary)
    print(f"\n{report.comparison_table(summary)}\n")
    for name in test:
        print(f"adapted, {name}: {report.figures_line(figures['adapted'][name])}")
    print(f"\nwritten to {run_dir} in {summary['seconds']:.1f} s")
    if not drawn:
        print("curves.png needs matplotlib: pip install -e '.[plots]'")
    return summary


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
    start = jax.jit(lambda key, params: jlora.init(key, params, what_to_train(config), uses))
    adapters = start(random_key(config.seed, "adapters"), params)
    if config.mode != "head":
        return adapters

    def new(key: jax.Array) -> dict[str, Any]:
        drawn, _ = named_leaves(network.init(key))
        return {path: drawn[path].astype(value.dtype) for path, value in adapters.items()}

    return jax.jit(new)(random_key(config.seed, "head"))


class _Kept:
    """The adapters that are kept, the newest or the best measured ones; on disk after every measurement."""

    def __init__(self, config: TrainConfig, task: Task, figure: str, folder: Path):
        self._newest, self._figure, self._folder = config.keep == "last", figure, folder
        self._sign, self._best = 1 if task.higher_is_better else -1, -math.inf
        self.adapters, self.epoch = {}, 0

    def look(self, record: Record, adapters: dict[str, Any]) -> None:
        value = self._sign * record[self._figure]
        if self._newest or value > self._best:
            # A copy: the next step reuses the memory.
            self._best, self.epoch, self.adapters = value, record["epoch"], jax.tree.map(jax.numpy.copy, adapters)
            jlora.save(self._folder, self.adapters)
