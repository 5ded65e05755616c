"""The parts of a run before training: examples, network, task, layout, plan.

A configuration that passed `TrainConfig.check` is checked here against the outside world: data and checkpoint
in `training_data`; devices, targets and the other processes in `make_job`. Reads no weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jlora
from jlora.messages import bullets
from train.compute import flops
from train.compute.keys import random_key
from train.compute.layouts import Layout, Mesh, make_layout
from train.compute.processes import check_same, say
from train.compute.step import init_state, make_step
from train.config import ConfigError, FitConfig, Pretrained, TrainConfig, flag
from train.data.batches import batch_of, default_buckets, longest, size, truncation_of
from train.data.ragged import Examples
from train.data.sources import Provenance
from train.data.tables import Table, load
from train.data.truncation import Truncation
from train.loop.state import Intervals, PrimaryMetric
from train.networks.network import Network, check_tokens
from train.networks.registry import make_network
from train.rundir.codec import flat, to_json
from train.tasks.base import Task
from train.tasks.classify import Classification, Texts
from train.tasks.encoding import encoded
from train.tasks.images import Images, count_blank
from train.tasks.labels import class_counts
from train.tasks.language import LanguageModel
from train.tasks.registry import make_task, resolved

OWN = ("cache_dir", "processes", "run_dir")
"""Fields that may differ between processes; the run directory is the first one's."""


@dataclass(frozen=True)
class TrainingData:
    """The examples of a configuration, encoded.

    Attributes:
      config: completed from its data, for example with the names of the labels.
      data: the provenance of the training and validation examples.
      network, task: those of the configuration.
      train, test: the examples by domain name; adapters train on the last domain, a base on the first.
    """

    config: TrainConfig
    data: Mapping[str, Provenance]
    network: Network
    task: Task
    train: Mapping[str, Examples]
    test: Mapping[str, Examples]

    @property
    def examples(self) -> Examples:
        """The training examples of the adapters."""
        return list(self.train.values())[-1]

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance of the examples, as JSON."""
        return {name: provenance.to_json() for name, provenance in self.data.items()}

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """The number of examples of each label, by set; empty for a task without classes."""
        names = self.task.labels if isinstance(self.task, Classification) else ()
        if not names:
            return {}
        return {name: class_counts(np.asarray(one["label"]), names) for name, one in self._sets.items()}

    @property
    def blank_images(self) -> dict[str, int]:
        """The number of single-colour images by set, without sets that have none."""
        sets = self._sets.items() if isinstance(self.task, Images) else ()
        return {name: n for name, one in sets if (n := count_blank(np.asarray(one["image"])))}

    @property
    def cuts(self) -> dict[str, Truncation]:
        """The truncation of texts, by set."""
        sets = {"train": self.examples, **self.test}
        found = {name: truncation_of(examples) for name, examples in sets.items()}
        return {name: cut for name, cut in found.items() if cut is not None}

    @property
    def primary_metrics(self) -> list[PrimaryMetric]:
        """`primary_metric` of each domain; the last one selects the best adapters."""
        return [self.primary_metric(domain) for domain in self.test]

    def primary_metric(self, domain: str) -> PrimaryMetric:
        """The task's primary metric on the test examples of a domain."""
        return PrimaryMetric(f"{domain}_{self.task.primary}", self.task.higher_is_better)

    @property
    def _sets(self) -> dict[str, Examples]:
        """The examples in their last domain."""
        return {"train": self.examples, "validation": list(self.test.values())[-1]}


@dataclass(frozen=True)
class Job(TrainingData):
    """A configuration with everything built from it.

    Attributes:
      layout: the device layout.
      shapes: the shapes and dtypes of the base's parameters.
      buckets: the padded lengths of batches.
      plan: the adapted weights and their adapters.
    """

    layout: Layout
    shapes: Any
    buckets: tuple[int, ...]
    plan: jlora.Plan

    def intervals(self, fit: FitConfig, examples: Examples) -> Intervals:
        """The intervals of metrics, evaluations and epochs for training on ``examples``."""
        return Intervals.of(
            fit.epochs,
            size(examples) // fit.batch_size,
            log_every=self.config.log_every,
            eval_every=self.config.eval_every,
            eval_every_steps=self.config.eval_every_steps,
        )


def training_data(
    config: TrainConfig, check: Callable[[], None] = lambda: None, other: TrainingData | None = None
) -> TrainingData:
    """Read and encode the examples of a valid configuration; ``check`` is called between the steps.

    Args:
      other: data of the same network and task, which are taken from there.

    Raises:
      ConfigError: if the data or the checkpoint do not fit the configuration, or the task is not that of ``other``.
    """
    tables = load(config.data, config.cache_dir)
    check()
    config = resolved(config, tables)
    if other is not None and config.task != other.config.task:
        raise ConfigError(_other_task(config, other.config))
    network = make_network(config) if other is None else other.network
    task = make_task(config, network) if other is None else other.task
    train, test = encoded_tables(task, tables, config.cache_dir)
    check()
    check_tokens(network, train, test)
    data = {name: table.provenance for name, table in tables.items() if table.provenance is not None}
    return TrainingData(config, data, network, task, train, test)


def make_job(config: TrainConfig, check: Callable[[], None]) -> Job:
    """Build everything that a valid configuration describes; ``check`` is called between the parts.

    Raises:
      ConfigError: if data, checkpoint, targets or devices do not fit it, or differ between processes.
    """
    return make_jobs([config], check)[0]


def make_jobs(configs: Sequence[TrainConfig], check: Callable[[], None]) -> list[Job]:
    """`make_job` of configurations with one network: they share it, its trace, the layout, and data that are the same.

    Raises:
      ConfigError: as `make_job`; and if the data make their networks or tasks different.
    """
    data: list[TrainingData] = []
    for i, config in enumerate(configs):
        same = next((one for one, other in zip(data, configs, strict=False) if _is_one_data(config, other)), None)
        found = training_data(config, check, data[0] if data else None) if same is None else same
        data.append(dataclasses.replace(found, config=dataclasses.replace(config, task=found.config.task)))
        _check_examples(data[i])
    first = data[0]
    layout = make_layout(first.config, first.network.rules)
    shapes = jax.eval_shape(first.network.init, jax.random.key(0))
    buckets = [bucket_lengths(one.config, one.train, one.test) for one in data]
    uses = uses_of(first.network, shapes, first.task.inputs(batch_of(first.examples, np.arange(1), buckets[0])))
    if isinstance(layout, Mesh):
        layout.shardings(shapes)  # raises if the weights cannot be split like this
    jobs, told = [], list[Any]()
    for one, lengths in zip(data, buckets, strict=True):
        parts = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        job = Job(**parts, layout=layout, shapes=shapes, buckets=lengths, plan=plan_of(one.config, shapes, uses))
        for name, cut in job.cuts.items() if one.train not in told else ():
            say(cut.describe(name))
        told.append(one.train)
        _check_processes(job)
        jobs.append(job)
    check()
    return jobs


def _check_examples(data: TrainingData) -> None:
    """Raises a ConfigError if there are too few training examples, with their source."""
    try:
        data.config.check_examples(size(data.examples))
    except ConfigError as error:
        raise ConfigError(f"{data.config.data.train}: {error}") from None


def _is_one_data(config: TrainConfig, other: TrainConfig) -> bool:
    return (config.data, config.task) == (other.data, other.task)


def _other_task(config: TrainConfig, other: TrainConfig) -> str:
    """The error for data that complete a task in another way, as by other labels."""
    fields = [field.name for field in dataclasses.fields(config.task)]
    pairs = {name: (getattr(config.task, name), getattr(other.task, name, None)) for name in fields}
    wrong = [f"task.{name}: {one!r:.200}, {two!r:.200} there" for name, (one, two) in pairs.items() if one != two]
    return (
        f"data.train: {config.data.train} needs another task than {other.data.train}:{bullets(wrong)}\nExpected data "
        f"of one task, which train in one program; state it for all: {flag(wrong[0].split(':')[0])}"
    )


def _check_processes(job: Job) -> None:
    """Raises a ConfigError if configuration, examples or plan differ between processes."""
    made = {name: value for name, value in flat(to_json(job.config)).items() if name.split(".")[0] not in OWN}
    made |= {f"data.{name}": f"{one.source}, sha256 {one.digest}" for name, one in job.data.items()}
    made["examples"] = {name: size(examples) for sets in (job.train, job.test) for name, examples in sets.items()}
    check_same({**made, "plan": str(job.plan), "buckets": job.buckets}, "the configuration")


def encoded_tables(
    task: Task, tables: Mapping[str, Table], cache_dir: Path
) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Training and validation examples by the name of their domain; a single domain is called ``validation``."""
    train, test = (encoded_table(task, tables[name], cache_dir) for name in ("train", "validation"))
    return train, {name or "validation": examples for name, examples in test.items()}


def encoded_table(task: Task, table: Table, cache_dir: Path) -> dict[str, Examples]:
    """``task.encode(table)``; of texts, from the cache."""
    if not isinstance(task, LanguageModel | Texts):
        return task.encode(table)
    identity = [type(task).__name__, to_json(task.config)]
    return {"": encoded(lambda table, draft: task.encode(table, draft)[""], table, identity, task.tokenizer, cache_dir)}


def bucket_lengths(config: TrainConfig, *sets: Mapping[str, Examples]) -> tuple[int, ...]:
    """The padded lengths of text batches: the configured ones that the examples need."""
    most = max(longest(examples) for named in sets for examples in named.values())
    if not most:
        return ()
    wanted = tuple(sorted(config.data.buckets or default_buckets(getattr(config.task, "max_length", 0))))
    if wanted[-1] < most:
        wanted = (*wanted, most)
    return tuple(bucket for i, bucket in enumerate(wanted) if i == 0 or wanted[i - 1] < most)


def uses_of(network: Network, shapes: Any, inputs: Mapping[str, Any]) -> Mapping[str, jlora.WeightUse]:
    """How the network consumes its weights, for `plan_of`."""
    return jlora.trace(network.forward, shapes, inputs)


def plan_of(config: TrainConfig, shapes: Any, uses: Mapping[str, jlora.WeightUse]) -> jlora.Plan:
    """The plan: the adapted weights and their adapters.

    Raises:
      ConfigError: if the configured targets do not fit the network.
    """
    try:
        plan = jlora.plan(shapes, config.adapted, uses)
    except ValueError as error:
        raise ConfigError(f"lora: {error}{_where_paths_are(config)}") from error
    if config.fit.optimizer == "lora-fa" and (tables := [path for path, target in plan.items() if target.lookup]):
        raise ConfigError(
            f"fit.optimizer: got 'lora-fa', which keeps A, and the A of a lookup table is zero: {', '.join(tables)} "
            "would never change; exclude it from lora.targets, or pass --fit.optimizer adamw"
        )
    return plan


def _where_paths_are(config: TrainConfig) -> str:
    """The command that shows the paths of the weights, for an error about the targets."""
    if not isinstance(config.model, Pretrained):
        return ""
    return f"\nTo see the paths: python -m train inspect {config.model.path}"


def start_adapters(
    config: TrainConfig,
    network: Network,
    params: Any,
    plan: jlora.Plan,
    *,
    keys: tuple[jax.Array, jax.Array] | None = None,
    new: Sequence[str] = (),
) -> dict[str, Any]:
    """Fresh adapters; with mode ``head``, a newly initialized head.

    Args:
      keys: of adapters and head; by default those of the seed.
      new: leaves trained whole that are drawn from the head's key, instead of copied from the params.
    """
    own, head = keys or (random_key(config.seed, "adapters"), random_key(config.seed, "head"))
    adapters: dict[str, Any] = jlora.init(own, params, plan)
    new = [*adapters] if config.mode == "head" else new
    if not new:
        return adapters
    drawn, _ = jlora.named_leaves(network.init(head))
    return adapters | {path: drawn[path].astype(adapters[path].dtype) for path in new}


def counted(config: TrainConfig) -> TrainConfig:
    """The configuration whose FLOPs count: nothing is recomputed, and no product is inside a kernel."""
    compute, model = dataclasses.replace(config.compute, remat="none"), config.model
    if isinstance(model, Pretrained):
        model = dataclasses.replace(model, attention="plain")
    return dataclasses.replace(config, compute=compute, model=model)


def ideal_seconds(job: Job) -> Callable[[tuple[int, ...]], float]:
    """Returns the time of a step at the devices' peak, by batch shape; 0 if the peak is unknown.

    Counts the products of the forward and the backward pass, see `counted`.
    """
    peak, config = flops.peak(jax.devices()[0]), job.config
    if peak is None:
        return lambda _: 0.0
    network = make_network(counted(config))
    tx = optax.identity()
    step = make_step(network.forward, job.task, tx, optax.constant_schedule(0.0))
    state = jax.eval_shape(lambda base: init_state(tx, start_adapters(config, network, base, job.plan)), job.shapes)

    @functools.cache
    def seconds(shape: tuple[int, ...]) -> float:
        batch = batch_of(job.examples, np.zeros(shape[0], np.int64), shape[1:])
        return flops.count(step, state, job.shapes, batch, jax.random.key(0)) / (peak * job.layout.devices)

    return seconds
