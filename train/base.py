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
from train import data, store
from train.config import TrainConfig
from train.loop import Record, fit, random_key
from train.model import Forward, Init

EVERYTHING = jlora.LoraConfig(targets=(), train_also=(r".",))


@dataclass(frozen=True)
class Base:
    """A trained base.

    Attributes:
      params: its parameters.
      records: of its training; see `train.loop.fit`.
      path: where it is cached.
      cached: whether it came from there.
    """

    params: Any
    records: list[Record]
    path: Path
    cached: bool


def base(
    forward: Forward,
    init: Init,
    examples: data.Examples,
    config: TrainConfig,
    evaluate: Callable[[Any], dict[str, float]],
    log: Callable[[Record], None],
) -> Base:
    """The base trained on ``examples``, from the cache if it is there.

    Args:
      init: random parameters from a key.
      evaluate, log: as in `train.loop.fit`; the records of a cached base are logged like new ones.
    """
    made_of = identity(config)
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    path = config.cache_dir / "bases" / digest[:16]
    if path.exists():
        abstract = jax.eval_shape(init, random_key(config.seed, "model"))
        params = store.load_tree(path / "params", abstract)
        records = json.loads((path / "records.json").read_text())
        for record in records:
            log(record)
        return Base(params, records, path, cached=True)

    start = jax.jit(init)(random_key(config.seed, "model"))
    adapters, records = fit(
        forward,
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


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the base: configuration, data, code and versions."""
    packages = (Path(__file__).parent, Path(jlora.__file__).parent)
    sources = [file.read_bytes() for package in packages for file in sorted(package.rglob("*.py"))]
    return {
        "model": dataclasses.asdict(config.model),
        "fit": dataclasses.asdict(config.base),
        "learning_rate": config.learning_rate.base,
        "eval_every": config.eval_every,
        "domain": dataclasses.asdict(config.data.upright),
        "data": hashlib.sha256(config.data.file.read_bytes()).hexdigest(),
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
