"""What to adapt and how: `LoraConfig` and its ordered `Override`s. Plain frozen data, round-trip to JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.fields import fits, shown
from jlora._src.paths import bad_pattern, bullets, nearest

HEADS = (r"(^|/)(lm_head|classifier|score|head)(/|$)",)
"""The default ``exclude``: output heads by name, as a whole component of the path."""


@dataclasses.dataclass(frozen=True)
class Override:
    """Overrides for the targets whose path matches ``pattern``; the first override that matches wins.

    >>> LoraConfig(rank=8, overrides=(Override(r"layer_0/", rank=2), Override(r"value", alpha=32)))

    Attributes:
      pattern: a regular expression, searched in the path.
      rank, alpha, dropout, use_rslora, use_dora: as in `LoraConfig`; None leaves the config's own.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None

    def __post_init__(self) -> None:
        _plain_numbers(self)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get a low-rank update, and which (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Attributes:
      rank: r, the inner size of the update; above 0.
      alpha: the update is scaled by ``alpha / rank``; above 0.
      targets: ``"all-linear"``: every weight that a matmul, convolution or expert matmul consumes first, as
        `trace` found (a table that is looked up first is not among them, also when it is tied to the output
        projection). Or regular expressions, searched in the ``/``-joined path.
      exclude: regular expressions of paths that are never adapted; by default output heads, by name.
      overrides: ordered overrides, the first match wins.
      train_also: regular expressions of leaves trained whole: a new head, norms, biases. They win over
        ``targets`` and ``exclude``. (PEFT's ``modules_to_save`` and ``bias``.)
      dropout: rate in [0, 1) on the adapters' input, where `attach` is given a key.
      use_rslora: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
      use_dora: learn the columns' magnitudes too (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
      dtype: of the trainable arrays, by name.

    Raises:
      ValueError: listing every field that is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = HEADS
    overrides: tuple[Override, ...] = ()
    train_also: tuple[str, ...] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _plain_numbers(self)
        wrong = [*_out_of_range("", self)]
        for name in ("targets", "exclude", "train_also"):
            value = getattr(self, name)
            if name == "targets" and value == "all-linear":
                continue
            if not isinstance(value, tuple | list):
                instead = f": ({value!r},)" if isinstance(value, str) else ""
                either = "'all-linear' or " if name == "targets" else ""
                wrong.append(f"{name}={shown(value)}; expected {either}a tuple of patterns{instead}")
                continue
            object.__setattr__(self, name, tuple(value))
            wrong += [f"{name}: {problem}" for p in value if (problem := bad_pattern(p))]
        if isinstance(self.overrides, tuple | list) and all(
            isinstance(override, Override) for override in self.overrides
        ):
            object.__setattr__(self, "overrides", tuple(self.overrides))
            for i, override in enumerate(self.overrides):
                wrong += _out_of_range(f"overrides[{i}].", override)
                wrong += [
                    f"overrides[{i}].pattern: {problem}" for p in [override.pattern] if (problem := bad_pattern(p))
                ]
        else:
            wrong.append(f"overrides={shown(self.overrides)}; expected a tuple of Override")
        try:
            floating = self.dtype is not None and jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name if floating else self.dtype)
        except (TypeError, ValueError):
            floating = False
        if not floating:
            wrong.append(f"dtype={shown(self.dtype)}; expected the name of a float dtype, such as 'float32'")
        if wrong:
            raise ValueError(f"LoraConfig: {len(wrong)} field(s) are out of range:{bullets(wrong)}")

    def for_path(self, path: str) -> LoraConfig:
        """This config with the first override that matches ``path`` applied."""
        override = next((r for r in self.overrides if re.search(r.pattern, path)), None)
        if override is None:
            return self
        given = {k: v for k, v in dataclasses.asdict(override).items() if k != "pattern" and v is not None}
        return dataclasses.replace(self, **given)

    @property
    def scale(self) -> float:
        """What multiplies ``a @ b``: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def to_json(self) -> str:
        """The config as JSON; `from_json` is its inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LoraConfig:
        """The config that `to_json` wrote.

        Raises:
          ValueError: naming every unknown field with the nearest known one, or every value out of range.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoraConfig:
        """A config from plain data, as in a JSON file; raises as `from_json`."""
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
        given["overrides"] = tuple(Override(**r) for r in overrides)
        return cls(**given)


def _plain_numbers(config: LoraConfig | Override) -> None:
    """Makes NumPy's scalars, and arrays of one number, Python's numbers: hashable, and the same after JSON."""
    for name in ("rank", "alpha", "dropout", "use_rslora", "use_dora"):
        value = getattr(config, name)
        if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
            object.__setattr__(config, name, value.item())


def _out_of_range(prefix: str, config: LoraConfig | Override) -> list[str]:
    expected = {
        "rank": (lambda x: type(x) is int and x > 0, "an integer above 0"),
        "alpha": (lambda x: fits(x, float) and x > 0, "a number above 0"),
        "dropout": (lambda x: fits(x, float) and 0 <= x < 1, "a rate in [0, 1)"),
        "use_rslora": (lambda x: type(x) is bool, "True or False"),
        "use_dora": (lambda x: type(x) is bool, "True or False"),
    }
    given = {name: getattr(config, name) for name in expected}
    return [
        f"{prefix}{name}={shown(value)}; expected {expected[name][1]}"
        for name, value in given.items()
        if not (expected[name][0](value) or (value is None and isinstance(config, Override)))
    ]


def _unknown(prefix: str, fields: dict[str, Any], cls: type) -> list[str]:
    names = [f.name for f in dataclasses.fields(cls)]
    return [f"{prefix}{name}{nearest(name, names, 1)}" for name in fields if name not in names]
