"""The base of a network without a checkpoint: trained from scratch, once, and cached for other runs.

Training from scratch is full fine-tuning of random parameters, so it uses the same step as everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jlora
from train.compute.keys import random_key
from train.compute.processes import all_agree, is_first, wait_for_all
from train.config import EVERYTHING, ImageClassification, TrainConfig
from train.data.tables import data_digests
from train.job import Job
from train.loop.evaluate import Measure
from train.loop.loop import Training, fit
from train.loop.stop import Stop
from train.rundir.bases import base_records, copy_base, has_base, load_base, save_base
from train.rundir.codec import to_json
from train.rundir.records import Record


@dataclass(frozen=True)
class Base:
    """A base to adapt.

    Attributes:
      params: its parameters, placed by the layout.
      source: their origin; for a base trained by this process, its place in the cache.
      trained: whether this process trained it.
    """

    params: Any
    source: str
    trained: bool


def pretrain(job: Job, kept: Path, measure: Measure, log: Callable[[Record], None], stop: Stop) -> Base:
    """The base of a run: from its directory, from the cache, or trained now.

    The run directory keeps a copy, so the run does not need the cache again.

    Args:
      kept: its place in the run directory.
      log: called with each record of its training, present or past.
      stop: checked after each step.
    """
    cached = cache_entry(job.config)
    found = next((path for path in (kept, cached) if all_agree(has_base(path))), None)
    if found is None:
        params = _train(job, cached, measure, log, stop)
    else:
        params = job.layout.place_base(job.shapes, lambda shardings: load_base(found, job.shapes, shardings))
        for record in base_records(found):
            log(record)
    if is_first() and found != kept:
        copy_base(cached, kept)
    return Base(params, str(found or cached), trained=found is None)


def _train(job: Job, cached: Path, measure: Measure, log: Callable[[Record], None], stop: Stop) -> Any:
    """Train the base on the examples of the first domain, and cache it."""
    config, network, layout, domain = job.config, job.network, job.layout, next(iter(job.test))
    examples = next(iter(job.train.values()))
    records: list[Record] = []

    def note(record: Record) -> None:
        records.append(record)
        log(record)

    def evaluate(adapters: dict[str, Any]) -> dict[str, float]:
        found = job.task.metrics(measure(start, adapters, job.test[domain]))
        return {f"{domain}_{metric}": value for metric, value in found.items()}

    key = random_key(config.seed, "model")
    start = layout.place_base(job.shapes, lambda shardings: jax.jit(network.init, out_shardings=shardings)(key))
    whole = random_key(config.seed, "base")
    training = Training(
        job,
        "base",
        examples,
        start=lambda base: jlora.init(whole, base, EVERYTHING),
        evaluate=evaluate,
        metric=job.primary_metric(domain),
        log=note,
    )
    fitted = fit(training, start, stop=stop)
    params = layout.to_host(layout.call(jlora.merge, start, fitted.adapters))
    if is_first():
        save_base(cached, params, records, identity(config))
    wait_for_all("base")
    return layout.place_base(job.shapes, lambda shardings: jax.device_put(params, shardings))


def cache_entry(config: TrainConfig) -> Path:
    """The cache entry of a configuration's base."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return config.cache_dir / "bases" / digest[:16]


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the parameters of a base: configuration, data, code and versions."""
    packages = (Path(__file__).parent, Path(jlora.__file__).parent)
    sources = [file.read_bytes() for package in packages for file in sorted(package.rglob("*.py"))]
    assert isinstance(config.task, ImageClassification)
    domains = list(config.task.domains.items())[:1]
    return {
        "model": to_json(config.model),
        "task": to_json(dataclasses.replace(config.task, domains=dict(domains))),
        "fit": to_json(config.scratch),
        "learning_rate": config.learning_rate.base,
        "data": [to_json(config.data), *data_digests(config.data)],
        "seed": config.seed,
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": jax.default_backend(),
    }
