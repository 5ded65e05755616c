"""What a run can be told: the schema of the files in ``configs/``, and the check that they are sound.

A configuration is data: frozen dataclasses without behaviour. `validate` looks at all of it before any model is built,
and lists every problem at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jlora import LoraConfig

Mode = Literal["lora", "full", "head"]
Schedule = Literal["cosine", "linear", "constant"]

ASSETS = Path(__file__).resolve().parent / "assets"
IMAGE_SIDE = 8


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message lists why and the way out."""


def default_cache_dir() -> Path:
    """``~/.cache/jlora``, or its place under ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"


@dataclass(frozen=True)
class Domain:
    """How the images of a domain are shown to the network.

    Attributes:
      quarter_turns: counter-clockwise turns by 90 degrees, which lose no pixel.
      invert: exchange ink and paper.
    """

    quarter_turns: int = 0
    invert: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The images, and the two domains in which they are shown.

    Attributes:
      file: a parquet file with columns image (64 numbers, 0 to 16), label (0 to 9) and split (train or test).
      upright: the domain on which the base is trained.
      shifted: the domain to which it is adapted.
    """

    file: Path = ASSETS / "digits.parquet"
    upright: Domain = Domain()
    shifted: Domain = Domain(quarter_turns=1, invert=True)


@dataclass(frozen=True)
class ModelConfig:
    """A small patch transformer.

    Attributes:
      patch: side of the square patches, in pixels.
      width: of the residual stream.
      depth: number of transformer blocks.
      heads: attention heads in a block.
      hidden: width of the hidden layer of a block's MLP.
    """

    patch: int = 2
    width: int = 96
    depth: int = 2
    heads: int = 4
    hidden: int = 192


@dataclass(frozen=True)
class FitConfig:
    """One training, of the base or of the adapters; AdamW.

    Attributes:
      epochs: passes over the training images.
      batch_size: images in a step; an epoch's last, incomplete batch is dropped.
      schedule: how the learning rate falls after the warm-up.
      warmup: share of all steps over which the learning rate rises from 0 to its peak.
      weight_decay: decoupled, and applied to all that is trained.
      clip: largest global norm of the gradient, or None.
    """

    epochs: int = 20
    batch_size: int = 64
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    clip: float | None = 1.0


@dataclass(frozen=True)
class LearningRates:
    """The peak learning rate of every training; low-rank factors take several times that of whole weights.

    Attributes:
      base: of the base, from scratch on upright images.
      lora: of adapters.
      full: of full fine-tuning.
      head: of a new head on the frozen base.
    """

    base: float = 2e-3
    lora: float = 1e-2
    full: float = 2e-3
    head: float = 1e-2


@dataclass(frozen=True)
class TrainConfig:
    """Train a base network on upright digits, freeze it, and adapt it to a shifted domain.

    Attributes:
      name: of the configuration; run directories are named after it.
      lora: what is adapted, and how; see `jlora.LoraConfig`.
      mode: what is trained on the shifted domain: adapters, every weight, or a new head alone.
      seed: of initialization, order of the data and dropout.
      data: the images and their two domains.
      model: the network.
      base: the training of the base.
      fit: the training on the shifted domain.
      learning_rate: peak learning rates.
      eval_every: epochs between two measurements on the test images.
      eval_batch_size: images predicted at once.
      run_dir: where the run is written; by default a new directory under runs/.
      cache_dir: where trained bases are kept.
    """

    name: str
    lora: LoraConfig
    mode: Mode = "lora"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    base: FitConfig = FitConfig()
    fit: FitConfig = FitConfig()
    learning_rate: LearningRates = LearningRates()
    eval_every: int = 4
    eval_batch_size: int = 200
    run_dir: Path | None = None
    cache_dir: Path = field(default_factory=default_cache_dir)


def validate(config: TrainConfig) -> None:
    """Check every field that can be checked without building anything.

    Raises:
      ConfigError: with a line for each problem: the field, what was got, what was expected, and what to pass instead.
    """
    _refuse(list(_problems(config)))


def validate_for(config: TrainConfig, examples: int) -> None:
    """Check what depends on the number of training examples; raises as `validate` does."""
    _refuse(
        [
            f"{phase}.batch_size: got {size}, expected at most the {examples} training examples; "
            f"pass {_flag(phase + '.batch_size')} {examples}"
            for phase, size in (("base", config.base.batch_size), ("fit", config.fit.batch_size))
            if size > examples
        ]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{count} in the configuration:", *problems]))


@dataclass(frozen=True)
class _Expectation:
    """What a field may hold: a test, the same in words, and a value that passes it."""

    holds: Callable[[Any], bool]
    words: str
    example: str


def _whole(least: int, example: int) -> _Expectation:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return _Expectation(holds, f"a whole number >= {least}", str(example))


def _number(words: str, test: Callable[[float], bool], example: str) -> _Expectation:
    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and test(value)

    return _Expectation(holds, words, example)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _is_file(value: Any) -> bool:
    return isinstance(value, Path) and value.is_file()


def _is_new_dir(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Path) and (not value.exists() or value.is_dir() and not any(value.iterdir()))


def _one_of(options: tuple[Any, ...]) -> _Expectation:
    return _Expectation(lambda value: value in options, f"one of {', '.join(map(str, options))}", str(options[0]))


_RATE = _number("a number > 0", lambda x: x > 0, "0.002")
_CLIP = _number("a number > 0, or None", lambda x: x > 0, "1.0")
_FIT = {
    "epochs": _whole(1, 20),
    "batch_size": _whole(1, 64),
    "schedule": _one_of(get_args(Schedule)),
    "warmup": _number("a share of the steps, 0 <= warmup < 1", lambda x: 0 <= x < 1, "0.1"),
    "weight_decay": _number("a number >= 0", lambda x: x >= 0, "0.0001"),
    "clip": _Expectation(lambda x: x is None or _CLIP.holds(x), _CLIP.words, _CLIP.example),
}
_PARTS = {
    "lora": LoraConfig,
    "data": DataConfig,
    "data.upright": Domain,
    "data.shifted": Domain,
    "model": ModelConfig,
    "base": FitConfig,
    "fit": FitConfig,
    "learning_rate": LearningRates,
}
_EXPECTATIONS = {
    "name": _Expectation(_is_name, "letters, digits and underscores", "digits"),
    "mode": _one_of(get_args(Mode)),
    "seed": _whole(0, 0),
    "data.upright.quarter_turns": _one_of((0, 1, 2, 3)),
    "data.upright.invert": _one_of((False, True)),
    "data.shifted.quarter_turns": _one_of((0, 1, 2, 3)),
    "data.shifted.invert": _one_of((False, True)),
    "model.patch": _one_of(tuple(side for side in range(1, IMAGE_SIDE + 1) if IMAGE_SIDE % side == 0)),
    "model.width": _whole(1, 96),
    "model.depth": _whole(1, 2),
    "model.heads": _whole(1, 4),
    "model.hidden": _whole(1, 192),
    **{f"{phase}.{name}": expectation for phase in ("base", "fit") for name, expectation in _FIT.items()},
    **{f"learning_rate.{name}": _RATE for name in ("base", "lora", "full", "head")},
    "eval_every": _whole(1, 4),
    "eval_batch_size": _whole(1, 200),
    "data.file": _Expectation(_is_file, "a parquet file", str(ASSETS / "digits.parquet")),
    "run_dir": _Expectation(_is_new_dir, "a directory that is empty or does not exist", "runs/mine"),
    "cache_dir": _Expectation(lambda x: isinstance(x, Path), "a pathlib.Path", "~/.cache/jlora"),
}


def _problems(config: TrainConfig) -> Iterator[str]:
    misplaced = [
        f"{path}: got {value!r}, expected a {kind.__name__}; write {path} = {kind.__name__}(...)"
        for path, kind in _PARTS.items()
        if not isinstance(value := _get(config, path), kind)
    ]
    if misplaced:
        yield from misplaced
        return

    bad = set()
    for path, expectation in _EXPECTATIONS.items():
        value = _get(config, path)
        if not expectation.holds(value):
            bad.add(path)
            got = str(value) if isinstance(value, Path) else repr(value)
            yield f"{path}: got {got}, expected {expectation.words}; pass {_flag(path)} {expectation.example}"

    width, heads = config.model.width, config.model.heads
    if not bad & {"model.width", "model.heads"} and width % heads:
        nearest = max(1, round(width / heads)) * heads
        yield (
            f"model.width: got {width}, expected a multiple of model.heads = {heads}; "
            f"pass {_flag('model.width')} {nearest}"
        )


def _get(config: TrainConfig, path: str) -> Any:
    """The field at a dotted ``path``; None below a part that is not there."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")
