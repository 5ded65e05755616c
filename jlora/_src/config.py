"""What to adapt and how: `LoraConfig` and its ordered `Override`s. Frozen dataclasses that convert to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import ml_dtypes
import numpy as np

from jlora.fields import Within, bad_pattern, faults
from jlora.messages import bullets, nearest, shown

HEADS = (r"(^|/)(lm_head|classifier|score|head)(/|$)",)
"""Patterns of output heads, by the usual names of their modules: the default ``exclude`` of `LoraConfig`."""

_Rank: TypeAlias = Annotated[int, Within(0, above=True)]
_Alpha: TypeAlias = Annotated[float, Within(0, above=True)]
_Rate: TypeAlias = Annotated[float, Within(0, 1, below=True)]
_Init: TypeAlias = Literal["kaiming", "gaussian", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class Override:
    """Settings for the targets whose path matches ``pattern``; the first override that matches applies.

    >>> LoraConfig(rank=8, overrides=(Override(r"layer_0/", rank=2), Override(r"value", alpha=32)))

    Attributes:
      pattern: a regular expression, searched in the path.
      rank, alpha, dropout, use_rslora, use_dora, init: as in `LoraConfig`; None keeps the config's.
    """

    pattern: str
    rank: _Rank | None = None
    alpha: _Alpha | None = None
    dropout: _Rate | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init: _Init | None = None

    def __post_init__(self) -> None:
        _plain_numbers(self)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get a low-rank update, and which kind (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Attributes:
      rank: r, the inner dimension of the update.
      alpha: the update is scaled by ``alpha / rank``.
      targets: ``"all-linear"``: every weight whose first matrix use in `trace` is a matmul, convolution or
        expert matmul (a table that is looked up first is not one, even if also the output projection). Or regular
        expressions, searched in the ``/``-joined path.
      exclude: regular expressions of paths that are never adapted; by default output heads (`HEADS`).
      overrides: settings by path; the first match wins.
      train_also: regular expressions of leaves to train whole: a new head, norms, biases. They take precedence over
        ``targets`` and ``exclude``. (PEFT's ``modules_to_save`` and ``bias``.)
      dropout: rate in [0, 1) on the adapter's input; active where `attach` is given a key.
      use_rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
      use_dora: train the columns' magnitudes too (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
      dtype: of the trainable arrays, by name.
      init: how `init` draws the factors; lookup tables keep A = 0, B from N(0, 1). ``"kaiming"``: A from
        U(±1/sqrt(fan_in)), B = 0. ``"gaussian"``: A from N(0, 1/rank²), B = 0 (Hu et al. 2021, section 4.1).
        ``"orthogonal"``: neither is zero, but ``A·B`` is, up to rounding: their entries are normal, of variance 1/200,
        over orthogonal halves of the rank's space (https://datta0.github.io/posts/rethink-lora-init). Needs an even
        rank. (PEFT's ``init_lora_weights``; for those that change the base weights, see `decompose`.)

    Raises:
      ValueError: listing every field that is out of range.
    """

    rank: _Rank = 8
    alpha: _Alpha = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = HEADS
    overrides: tuple[Override, ...] = ()
    train_also: tuple[str, ...] = ()
    dropout: _Rate = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    dtype: str = "float32"
    init: _Init = "kaiming"

    def __post_init__(self) -> None:
        _plain_numbers(self)
        for name in ("targets", "exclude", "train_also", "overrides"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        wrong = [*_bad_settings(self), *_bad_patterns(self), *_bad_overrides(self.overrides)]
        wrong = wrong or _bad_ranks(self)
        if (dtype := _float_name(self.dtype)) is None:
            wrong.append(f"dtype = {shown(self.dtype)}; expected the name of a float dtype, such as 'float32'")
        object.__setattr__(self, "dtype", dtype)
        if wrong:
            raise ValueError(f"LoraConfig: {len(wrong)} field(s) are out of range:{bullets(wrong)}")

    def for_path(self, path: str) -> LoraConfig:
        """This config with the first override that matches ``path`` applied."""
        override = next((o for o in self.overrides if re.search(o.pattern, path)), None)
        if override is None:
            return self
        given = {k: v for k, v in dataclasses.asdict(override).items() if k != "pattern" and v is not None}
        return dataclasses.replace(self, **given)

    @property
    def scale(self) -> float:
        """The factor on ``a @ b``: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def to_json(self) -> str:
        """The config as JSON; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LoraConfig:
        """Parses what `to_json` wrote.

        Raises:
          ValueError: listing every unknown field with the closest known one, or every value out of range.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoraConfig:
        """A config from parsed JSON; raises as `from_json`."""
        if not isinstance(fields, dict):
            raise ValueError(f"LoraConfig: got {shown(fields)}; expected an object of its fields")
        overrides = fields.get("overrides", ())
        if not isinstance(overrides, tuple | list) or not all(isinstance(override, dict) for override in overrides):
            raise ValueError(f"LoraConfig: overrides = {shown(overrides)}; expected a list of objects")
        unknown = _unknown("", fields, cls)
        for i, override in enumerate(overrides):
            unknown += _unknown(f"overrides[{i}].", override, Override)
            unknown += [] if "pattern" in override else [f"overrides[{i}].pattern is missing"]
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise ValueError(f"LoraConfig: unknown or missing field(s):{bullets(unknown)}\nExpected among: {known}.")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        given["overrides"] = tuple(Override(**override) for override in overrides)
        return cls(**given)


_NUMBERS = ("rank", "alpha", "dropout", "use_rslora", "use_dora")
_SHARED = (*_NUMBERS, "init")
"""The fields that `LoraConfig` and `Override` share."""


def _plain_numbers(config: LoraConfig | Override) -> None:
    """Turns scalars of NumPy and JAX into Python numbers, which hash and survive JSON."""
    for name in _NUMBERS:
        value = getattr(config, name)
        if getattr(value, "ndim", None) == 0:
            object.__setattr__(config, name, value.item())


def _float_name(dtype: Any) -> str | None:
    """The name of a floating dtype; None for anything else."""
    try:
        name = np.dtype(dtype).name  # NumPy takes None for float64
        # A complex dtype has the finfo of its real part.
        return name if dtype is not None and ml_dtypes.finfo(dtype).dtype.name == name else None
    except (TypeError, ValueError):
        return None


def _bad_settings(config: LoraConfig | Override, prefix: str = "") -> list[str]:
    hints = get_type_hints(type(config), include_extras=True)
    given = {prefix + name: getattr(config, name) for name in _SHARED}
    return faults(given, {prefix + name: hints[name] for name in _SHARED})


def _bad_ranks(config: LoraConfig) -> list[str]:
    """Odd ranks of an orthogonal init, which halves the rank."""
    ranks = {"rank": (config.rank, config.init)}
    for i, override in enumerate(config.overrides):
        ranks[f"overrides[{i}].rank"] = override.rank or config.rank, override.init or config.init
    return [
        f"{name} = {rank}; expected an even one: init = 'orthogonal' halves it"
        for name, (rank, init) in ranks.items()
        if init == "orthogonal" and rank % 2
    ]


def _bad_patterns(config: LoraConfig) -> list[str]:
    wrong = []
    for name in ("targets", "exclude", "train_also"):
        value = getattr(config, name)
        if isinstance(value, tuple):
            wrong += [f"{name}: {problem}" for pattern in value if (problem := bad_pattern(pattern))]
        elif name != "targets" or value != "all-linear":
            instead = f": ({value!r},)" if isinstance(value, str) else ""
            either = "'all-linear' or " if name == "targets" else ""
            wrong.append(f"{name} = {shown(value)}; expected {either}a tuple of patterns{instead}")
    return wrong


def _bad_overrides(overrides: Any) -> list[str]:
    if not isinstance(overrides, tuple) or not all(isinstance(override, Override) for override in overrides):
        return [f"overrides = {shown(overrides)}; expected a tuple of Override"]
    wrong = []
    for i, override in enumerate(overrides):
        wrong += _bad_settings(override, f"overrides[{i}].")
        wrong += [f"overrides[{i}].pattern: {problem}"] if (problem := bad_pattern(override.pattern)) else []
    return wrong


def _unknown(prefix: str, fields: dict[str, Any], cls: type) -> list[str]:
    names = [f.name for f in dataclasses.fields(cls)]
    return [f"{prefix}{name}{nearest(name, names, 1)}" for name in fields if name not in names]
