"""What a run is made of before anything is trained: data, network, task, layout, plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora
from train.compute.keys import random_key
from train.compute.layouts import Layout, Mesh, make_layout
from train.compute.processes import check_same, say
from train.config import ConfigError, FitConfig, TrainConfig
from train.data.batches import Examples, batch_of, default_buckets, lengths, size, truncation_of
from train.data.sources import Provenance
from train.data.tables import Table, load
from train.data.truncation import Truncation
from train.loop.state import Intervals, PrimaryMetric
from train.networks.network import Network, check_tokens
from train.networks.registry import make_network
from train.rundir.files import flat, to_json
from train.tasks.base import Task
from train.tasks.classify import Classification
from train.tasks.images import Images, count_blank
from train.tasks.labels import class_counts
from train.tasks.registry import make_task, resolved

OWN = ("cache_dir", "processes", "run_dir")
"""Fields that each process may have for itself; of the run directory the first one's counts."""


@dataclass(frozen=True)
class Job:
    """A configuration, and what was made of it.

    Attributes:
      config: completed with what it takes from its data.
      network, task, layout: as it says. No weight is read yet.
      train, test: the examples by the name of their domain; the last one is learnt, the first one by a base.
      data: what is told of the training and the validation examples.
      buckets: the lengths to which batches are padded.
      shapes: of the base's parameters, as the network makes them.
      plan: which of them are trained, and how.
    """

    config: TrainConfig
    network: Network
    task: Task
    layout: Layout
    train: Mapping[str, Examples]
    test: Mapping[str, Examples]
    data: Mapping[str, Provenance]
    buckets: tuple[int, ...]
    shapes: Any
    plan: jlora.Plan

    @property
    def examples(self) -> Examples:
        """The training examples."""
        return self.train[list(self.train)[-1]]

    @property
    def provenance(self) -> dict[str, Any]:
        """What is told of the data, as JSON."""
        return {name: provenance.to_json() for name, provenance in self.data.items()}

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """How many examples of each set have each label; nothing of a task without classes."""
        names = self.task.labels if isinstance(self.task, Classification) else ()
        return (
            {name: class_counts(np.asarray(one["label"]), names) for name, one in self._sets.items()} if names else {}
        )

    @property
    def blank_images(self) -> dict[str, int]:
        """How many images of each set have one colour only, in the sets that have some."""
        sets = self._sets.items() if isinstance(self.task, Images) else ()
        return {name: n for name, one in sets if (n := count_blank(np.asarray(one["image"])))}

    @property
    def _sets(self) -> dict[str, Examples]:
        """The examples as one domain shows them."""
        return {"train": self.examples, "validation": list(self.test.values())[-1]}

    def primary_metric(self, domain: str) -> PrimaryMetric:
        """The task's primary metric on the test examples of a domain."""
        return PrimaryMetric(f"{domain}_{self.task.primary}", self.task.higher_is_better)

    @property
    def cuts(self) -> dict[str, Truncation]:
        """What was cut of each set of texts."""
        found = {"train": truncation_of(self.examples)} | {
            name: truncation_of(examples) for name, examples in self.test.items()
        }
        return {name: cut for name, cut in found.items() if cut is not None}

    def intervals(self, fit: FitConfig, examples: Examples) -> Intervals:
        """When something is due in a training on some examples."""
        return Intervals.of(
            fit.epochs,
            size(examples) // fit.batch_size,
            log_every=self.config.log_every,
            eval_every=self.config.eval_every,
            eval_every_steps=self.config.eval_every_steps,
        )


class TrainingData(NamedTuple):
    """What a run learns, before anything is said of how.

    Attributes:
      config: completed with what it takes from its data.
      tables: the data, by ``train`` and ``validation``.
      network, task: as it says. No weight is read yet.
      train, test: the examples by the name of their domain.
    """

    config: TrainConfig
    tables: Mapping[str, Table]
    network: Network
    task: Task
    train: Mapping[str, Examples]
    test: Mapping[str, Examples]


def training_data(config: TrainConfig, check: Callable[[], None] = lambda: None) -> TrainingData:
    """The examples that a valid configuration names, encoded; ``check`` is called between the steps.

    Raises:
      ConfigError: if the data or the checkpoint are not as it says.
    """
    tables = load(config.data, config.cache_dir)
    check()
    config = resolved(config, tables)
    network = make_network(config)
    task = make_task(config, network)
    train, test = encoded(task, tables)
    check()
    check_tokens(network, train, test)
    return TrainingData(config, tables, network, task, train, test)


def make_job(config: TrainConfig, check: Callable[[], None]) -> Job:
    """All that a valid configuration says, ready to be trained; ``check`` is called between its parts.

    Shapes are all that the plan needs: what does not fit the model is refused before anything is read or trained.

    Raises:
      ConfigError: if data, checkpoint, targets or devices are not as it says, or not the same in all processes.
    """
    config, tables, network, task, train, test = training_data(config, check)
    learnt = train[list(train)[-1]]
    config.check_examples(size(learnt))
    layout = make_layout(config, network.rules)
    buckets = bucket_lengths(config, train, test)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    plan = plan_of(config, network, shapes, task.inputs(batch_of(learnt, np.arange(1), buckets)))
    data = {name: table.provenance for name, table in tables.items() if table.provenance is not None}
    job = Job(config, network, task, layout, train, test, data, buckets, shapes, plan)
    for name, cut in job.cuts.items():
        say(cut.describe(name))
    if isinstance(layout, Mesh):
        layout.shardings(job.shapes)  # refused here, before there is a run directory
    told = {name: value for name, value in flat(to_json(config)).items() if name.split(".")[0] not in OWN}
    examples = {name: size(one) for sets in (train, test) for name, one in sets.items()}
    told |= {f"data.{name}": f"{one.source}, sha256 {one.digest}" for name, one in data.items()}
    check_same({**told, "examples": examples, "plan": str(plan), "buckets": buckets}, "the configuration")
    check()
    return job


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
    wanted = tuple(sorted(config.data.buckets or default_buckets(most)))
    if wanted[-1] < longest:
        wanted = (*wanted, longest)
    return tuple(bucket for i, bucket in enumerate(wanted) if i == 0 or wanted[i - 1] < longest)


def plan_of(config: TrainConfig, network: Network, shapes: Any, inputs: Mapping[str, Any]) -> jlora.Plan:
    """What the mode of a configuration trains, of parameters of these shapes."""
    uses = jlora.trace(network.forward, shapes, inputs)
    try:
        return jlora.plan(shapes, config.adapted, uses)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def start_adapters(config: TrainConfig, network: Network, params: Any, plan: jlora.Plan) -> dict[str, Any]:
    """Fresh adapters; with the mode ``head``, a freshly initialized head."""
    adapters: dict[str, Any] = jlora.init(random_key(config.seed, "adapters"), params, plan)
    if config.mode != "head":
        return adapters
    drawn, _ = jlora.named_leaves(network.init(random_key(config.seed, "head")))
    return {path: drawn[path].astype(value.dtype) for path, value in adapters.items()}
