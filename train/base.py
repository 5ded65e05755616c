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
from train import store
from train.batches import Examples
from train.config import ImageClassification, TrainConfig
from train.loop import Record, fit, random_key
from train.networks import EVERYTHING, Network
from train.tasks import Task


@dataclass(frozen=True)
class Base:
    """A base to adapt.

    Attributes:
      params: its parameters.
      records: of its training; see `train.loop.fit`.
      path: where it is cached; None for one that was not trained here.
      cached: whether it came from there.
    """

    params: Any
    records: list[Record]
    path: Path | None
    cached: bool


def base(
    network: Network,
    task: Task,
    examples: Examples,
    config: TrainConfig,
    evaluate: Callable[[Any], dict[str, float]],
    log: Callable[[Record], None],
) -> Base:
    """The base trained on ``examples``, from the cache if it is there.

    Args:
      config: of the run; its ``base`` says how the base is trained.
      evaluate, log: as in `train.loop.fit`; the records of a cached base are logged like new ones.
    """
    assert config.base is not None
    made_of = identity(config)
    path = cached_at(config, made_of)
    if path.exists():
        params = load_params(path, network)
        records = json.loads((path / "records.json").read_text())
        for record in records:
            log(record)
        return Base(params, records, path, cached=True)

    start = jax.jit(network.init)(random_key(config.seed, "model"))
    adapters, records = fit(
        network.forward,
        task,
        start,
        jlora.init(random_key(config.seed, "base"), start, EVERYTHING),
        examples,
        config.base,
        phase="base",
        learning_rate=config.learning_rate.base,
        seed=config.seed,
        eval_every=config.eval_every,
        evaluate=evaluate,
        log=log,
    )
    params = jax.jit(jlora.merge)(start, adapters)
    publish(path, params, records, made_of)
    return Base(params, records, path, cached=False)


def load_params(path: Path, network: Network) -> Any:
    """The parameters of a cached base."""
    return store.load_tree(path / "params", jax.eval_shape(network.init, jax.random.key(0)))


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
        "model": store.to_json(config.model),
        "task": store.to_json(dataclasses.replace(config.task, domains=dict(domains))),
        "fit": store.to_json(config.base),
        "learning_rate": config.learning_rate.base,
        "eval_every": config.eval_every,
        "data": [store.to_json(config.data), _content(config.data.train)],
        "seed": config.seed,
        "sources": hashlib.sha256(b"\0".join(sources)).hexdigest(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": jax.default_backend(),
    }


def _content(source: str) -> str | None:
    """A digest of a local file, or of a folder's files; None for what lies elsewhere."""
    path = Path(source if Path(source).exists() else source.rpartition(":")[0] or source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest() if files else None


def publish(path: Path, params: Any, records: list[Record], made_of: dict[str, Any]) -> None:
    """Make the cache entry elsewhere and move it into place at once: others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix="draft-"))
    try:
        store.save_tree(draft / "params", params)
        store.write_json(draft / "records.json", records)
        store.write_json(draft / "identity.json", made_of)
        draft.rename(path)
    except OSError:
        # Another run trained the same base meanwhile; its entry is as good as this one.
        if not path.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
