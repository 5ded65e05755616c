"""The base's parameters: trained once from scratch, then taken from the cache.

Training from scratch is full fine-tuning of random parameters, so it goes through the same step as everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.files.checksums import check_sums, write_sums
from jlora.models import TensorError
from train.compute.keys import random_key
from train.compute.processes import all_agree, is_first, wait_for_all
from train.config import EVERYTHING, ConfigError, ImageClassification, TrainConfig
from train.data.tables import data_digests
from train.job import Job
from train.loop.evaluate import Measure
from train.loop.loop import Training, fit
from train.loop.stop import Stop
from train.networks.network import Network
from train.rundir import files
from train.rundir.records import Record


@dataclass(frozen=True)
class Base:
    """A base to adapt.

    Attributes:
      params: its parameters, at their places.
      path: where it is cached; None for one that was not trained here.
      cached: whether it came from there.
    """

    params: Any
    path: Path | None
    cached: bool


def base(job: Job, measure: Measure, log: Callable[[Record], None], stop: Stop) -> Base:
    """The base trained on the examples of the first domain, from the cache if it is there.

    Args:
      log: called with each record of its training; those of a cached base are logged like new ones.
      stop: asked after each step.
    """
    config, network, layout, domain = job.config, job.network, job.layout, next(iter(job.test))
    assert config.base is not None
    examples, made_of = next(iter(job.train.values())), identity(config)
    path = cached_at(config, made_of)
    if all_agree(path.exists()):
        params = layout.place_base(job.shapes, lambda shardings: load_params(path, network, shardings))
        for record in json.loads((path / "records.json").read_text()):
            log(record)
        return Base(params, path, cached=True)

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
        publish(path, params, records, made_of)
    wait_for_all("base")
    return Base(layout.place_base(job.shapes, lambda shardings: jax.device_put(params, shardings)), path, cached=False)


def load_params(path: Path, network: Network, shardings: Any = None) -> Any:
    """The parameters of a cached base, at these places.

    Raises:
      ConfigError: if a file of it is damaged.
    """
    try:
        check_sums(path)
    except TensorError as error:
        raise ConfigError(f"{error}\nOr remove {path}: a run of this configuration trains the base again.") from error
    return files.load_tree(path / "params", jax.eval_shape(network.init, jax.random.key(0)), shardings)


def cached_at(config: TrainConfig, made_of: dict[str, Any]) -> Path:
    """Where the base of a configuration, whose `identity` is ``made_of``, is cached."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    return config.cache_dir / "bases" / digest[:16]


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the base: configuration, data, code and versions."""
    packages = (Path(__file__).parent, Path(jlora.__file__).parent)
    sources = [file.read_bytes() for package in packages for file in sorted(package.rglob("*.py"))]
    assert isinstance(config.task, ImageClassification)
    domains = list(config.task.domains.items())[:1]
    return {
        "model": files.to_json(config.model),
        "task": files.to_json(dataclasses.replace(config.task, domains=dict(domains))),
        "fit": files.to_json(config.base),
        "learning_rate": config.learning_rate.base,
        "records": [config.eval_every, config.eval_every_steps, config.log_every],
        "data": [files.to_json(config.data), *data_digests(config.data)],
        "seed": config.seed,
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": jax.default_backend(),
    }


def publish(path: Path, params: Any, records: list[Record], made_of: dict[str, Any]) -> None:
    """Make the cache entry elsewhere and move it into place at once: others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix="draft-"))
    try:
        files.save_tree(draft / "params", params)
        files.write_json(draft / "records.json", records)
        files.write_json(draft / "identity.json", made_of)
        write_sums(draft)
        draft.rename(path)
    except OSError:
        # Another run trained the same base meanwhile; its entry is as good as this one.
        if not path.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
