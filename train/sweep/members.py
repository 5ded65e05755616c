"""The members of a sweep: one for each combination of the swept values."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import ConfigError, SweepConfig, TrainConfig, refuse
from train.data.lines import File
from train.data.sources import SUFFIXES, VALIDATION, parse

LONGEST = 60
"""The largest number of characters of a data set's name in that of a member."""


@dataclass(frozen=True)
class Member:
    """One training of a sweep.

    Attributes:
      name: the swept fields with their values, such as ``acme-rank4-lr0.0001-seed0``; distinct, and a folder's name.
      values: the swept fields and their values, such as ``{"rank": 4, "lr": 1e-4, "seed": 0}``.
      config: the configuration of this training alone, as if its values had been passed by their own flags.
    """

    name: str
    values: dict[str, Any]
    config: TrainConfig


def members(config: TrainConfig) -> list[Member]:
    """The members of a sweep: the product of its values in the order of the fields, the last one varying fastest.

    Reads the names in the folder of ``sweep.data``, if it is one.

    Raises:
      ConfigError: for a folder without data sets; or listing the problems of the members' configurations.
    """
    if config.sweep.data:
        sweep = dataclasses.replace(config.sweep, data=data_sets(config.sweep.data))
        config = dataclasses.replace(config, sweep=sweep)
        config.check()
    given = config.sweep.given
    names = dict(zip(given.get("data", ()), short_names(given.get("data", ())), strict=True))
    found, wrong = [], {}
    for combination in itertools.product(*given.values()):
        values = dict(zip(given, combination, strict=True))
        name = "-".join(names[one] if field == "data" else f"{field}{shown(one)}" for field, one in values.items())
        try:
            single = with_values(config, values)
            single.check()
            found.append(Member(name, values, single))
        except ValueError as error:  # of LoraConfig, or a ConfigError
            wrong.setdefault(_problems(error), []).append(name)
    refuse(
        f"sweep: member {first}{f' and {len(more):,} more' if more else ''}: {problem}"
        for problem, (first, *more) in wrong.items()
    )
    return found


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a single training, with these values of swept fields instead of its own."""
    parts = {
        "data": ("data", "train"),
        "rank": ("lora", "rank"),
        "alpha": ("lora", "alpha"),
        "dropout": ("lora", "dropout"),
        "lr": ("learning_rate", config.mode),
        "lora_plus": ("fit", "lora_plus"),
        "weight_decay": ("fit", "weight_decay"),
    }
    changed: dict[str, dict[str, Any]] = {}
    for field, value in values.items():
        if field != "seed":
            part, name = parts[field]
            changed.setdefault(part, {})[name] = value
    whole = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in changed.items()}
    return dataclasses.replace(config, sweep=SweepConfig(), seed=values.get("seed", config.seed), **whole)


def data_sets(sources: Sequence[str]) -> tuple[str, ...]:
    """The sources of a sweep; for a single one that is a local folder, the data sets in it, sorted by name.

    These are its data files and folders, without hidden ones, and without files named ``validation``, ``dev`` and so
    on, where the other files find their validation examples.

    Raises:
      ConfigError: if there are none, or if one is empty.
    """
    folder = Path(os.path.expanduser(sources[0]))
    if len(sources) > 1 or not folder.is_dir():
        return tuple(sources)
    found = [one for one in sorted(folder.iterdir()) if one.is_dir() or File(one, one.name).suffix in SUFFIXES]
    found = [one for one in found if not one.name.startswith(".") and not (one.is_file() and _stem(one) in VALIDATION)]
    if not found:
        raise ConfigError(
            f"sweep.data: got {folder}, which has no data sets; expected files ({', '.join(SUFFIXES)}) or folders in it"
        )
    refuse(f"sweep.data: {one} is empty; add examples or remove it" for one in found if _is_empty(one))
    return tuple(map(str, found))


def short_names(sources: Sequence[str]) -> list[str]:
    """Short, distinct names of data sets, for folders.

    The name of the file without its suffixes; where two are equal, with the split, with the suffixes, and with the
    folders above.
    """
    parsed = [parse(source) for source in sources]
    deepest = max((len(Path(location).parts) for location, _ in parsed), default=0)
    for depth in range(1, deepest + 1):
        for with_split, with_suffix in ((False, False), (True, False), (True, True)):
            names = [
                _name(Path(location), (split or "") * with_split, depth, with_suffix) for location, split in parsed
            ]
            if len({name.casefold() for name in names}) == len(names):
                return names
    return [f"data{number}" for number in range(1, len(sources) + 1)]


def _is_empty(path: Path) -> bool:
    if path.is_dir():
        return all(one.name.startswith(".") for one in path.iterdir())
    return path.stat().st_size == 0


def _name(path: Path, split: str, depth: int, with_suffix: bool) -> str:
    parts = [*path.parts[-depth:-1], path.name if with_suffix else _stem(path), split]
    text = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-.")
    return text[-LONGEST:].lstrip("-.") or "data"


def _stem(path: Path) -> str:
    """The name of a data file without its suffixes; of a folder or dataset, its name."""
    suffix = File(path, path.name).suffix
    return path.name[: path.name.lower().rindex(suffix)] if suffix in SUFFIXES else path.name


def shown(value: float) -> str:
    return repr(value).removesuffix(".0")


def _problems(error: ValueError) -> str:
    """The problems in an error, in one line."""
    first, *more = (line.strip(" -") for line in str(error).splitlines())
    return "; ".join(more) or first
