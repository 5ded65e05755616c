"""From a source to a table: what `train.config.DataConfig` names, read by `datasets`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from jlora._paths import nearest
from train.config import ConfigError, DataConfig

READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
VALIDATION = ("validation", "dev", "valid", "val", "test")
"""What the examples that are not trained on are called, by preference."""


class Table(datasets.Dataset):
    """Rows that know their numbers in the source.

    Attributes:
      rows: the number of each row in the source, from 0; None for all in their order.
    """

    rows: np.ndarray | None = None

    def select(self, indices: Iterable[int], *args: Any, **options: Any) -> Table:  # pyright: ignore
        chosen = np.asarray(list(indices), np.int64)
        found: Any = super().select(chosen, *args, **options)
        found.__class__ = Table
        found.rows = chosen if self.rows is None else self.rows[chosen]
        return found

    def where(self, rows: Sequence[int], most: int = 5) -> str:
        """The places of rows in their source, such as ``rows 2, 7``; they count from 1, without a header."""
        found = sorted(rows if self.rows is None else self.rows[list(rows)].tolist())
        rest = f" and {len(rows) - most:,} more" if len(rows) > most else ""
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(f'{row + 1:,}' for row in found[:most])}{rest}"


def load(config: DataConfig, cache_dir: Path) -> dict[str, Table]:
    """The training and the validation examples.

    Local files are converted to Arrow files below ``cache_dir`` and mapped; only datasets of the hub are fetched.

    Returns:
      ``{"train": table, "validation": table}``.

    Raises:
      ConfigError: if a source is not there, cannot be read, is empty, or if there is no validation data.
    """
    train = read(config.train, cache_dir, "data.train")
    # Files are often in some order. A choice does not depend on the run's seed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(train))
    if config.validation is None and config.holdout:
        apart = round(config.holdout * len(train))
        if not 0 < apart < len(train):
            raise ConfigError(
                f"data.holdout: {config.holdout} of {len(train)} training examples are {apart}; expected at least one "
                "on either side. Pass another --data.holdout, or --data.validation FILE"
            )
        validation, order = train.select(order[:apart]), order[apart:]
    else:
        source = config.validation or _beside(config.train)
        validation = read(source, cache_dir, "data.validation")
    if config.limit is not None and config.limit < len(order) or len(order) < len(train):
        train = train.select(order[: config.limit])
    if config.validation_limit is not None:
        validation = validation.select(range(min(config.validation_limit, len(validation))))
    return {"train": train, "validation": validation}


def read(source: str, cache_dir: Path, field: str) -> Table:
    """The examples of one source.

    Args:
      source: see `train.config.DataConfig`.
      field: the field of the configuration that it came from, for errors.

    Raises:
      ConfigError: as `load`.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    location, split = _parse(source)
    path = Path(location)
    try:
        if path.is_file():
            table = _from_file(path, split, cache_dir, field)
        elif path.is_dir():
            table = _from_dataset(str(path), None, split, cache_dir, field)
        elif path.suffix in READERS or location.startswith((".", "/")):
            siblings = sorted(str(file) for file in path.parent.glob("*") if file.suffix in READERS)
            raise ConfigError(f"{field}: there is no file at {location}{nearest(location, siblings)}")
        else:
            owner, name, *configuration = [*location.split("/", 2), ""][: max(2, location.count("/") + 1)]
            dataset = f"{owner}/{name}".rstrip("/")
            table = _from_dataset(dataset, configuration[0] if configuration else None, split, cache_dir, field)
    except ConfigError:
        raise
    except Exception as error:  # whatever a reader raises of a malformed file: datasets has no common class for it
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{field}: {source} cannot be read: {reason[0]} Expected a file ({', '.join(READERS)}), a folder of such, "
            "or a dataset on the hub as owner/name:split"
        ) from error
    if not len(table):
        raise ConfigError(f"{field}: {source} has no examples")
    table.__class__ = Table
    return table  # pyright: ignore[reportReturnType]


def column(table: Table, name: str, field: str) -> list[Any]:
    """A column's values.

    Args:
      field: the field of the configuration that names the column, for errors.

    Raises:
      ConfigError: if there is no such column, or values are missing in it.
    """
    if name not in table.column_names:
        advice = "rename the column" if field == "file" else f"pass --{field.replace('_', '-')} and one of them"
        raise ConfigError(
            f"{field}: the data has no column {name!r}{nearest(name, table.column_names)}; it has "
            f"{', '.join(table.column_names)}; {advice}"
        )
    values = list(table[name])
    if missing := sum(value is None for value in values):
        raise ConfigError(
            f"{field}: {missing} of {len(values)} values of the column {name!r} are missing; take these rows out"
        )
    return values


def _parse(source: str) -> tuple[str, str | None]:
    """Location and split."""
    source = os.path.expanduser(source)
    if Path(source).exists():
        return source, None
    location, colon, split = source.rpartition(":")
    return (location, split) if colon and location and "/" not in split else (source, None)


def _from_file(path: Path, split: str | None, cache_dir: Path, field: str) -> datasets.Dataset:
    if not path.read_bytes()[:4096].strip():
        raise ConfigError(f"{field}: {path} is empty")
    if path.suffix not in READERS:
        raise ConfigError(f"{field}: {path} ends in {path.suffix!r}; expected one of {', '.join(READERS)}")
    reader, options = READERS[path.suffix]
    table = datasets.load_dataset(
        reader, data_files=[str(path)], split="train", cache_dir=str(cache_dir / "datasets"), **options
    )
    assert isinstance(table, datasets.Dataset)
    if split is None:
        return table
    if "split" not in table.column_names:
        raise ConfigError(f"{field}: {path} has no column `split`, by which :{split} would choose rows")
    rows = [i for i, value in enumerate(table["split"]) if value == split]
    if not rows:
        raise ConfigError(f"{field}: {path} has no row whose split is {split!r}")
    return table.select(rows)


def _from_dataset(
    name: str, configuration: str | None, split: str | None, cache_dir: Path, field: str
) -> datasets.Dataset:
    found = datasets.load_dataset(name, configuration, cache_dir=str(cache_dir / "datasets"))
    assert isinstance(found, datasets.DatasetDict)
    # A source without a split means the training examples, or for validation the first of the usual names.
    wanted = (split,) if split else ("train",) if field == "data.train" else VALIDATION
    for name in wanted:
        if name in found:
            return found[name]
    raise ConfigError(f"{field}: there is no split {' or '.join(wanted)}; there are {', '.join(map(str, found))}")


def _beside(train: str) -> str:
    """The source of the validation examples that goes with one of training examples."""
    location, _ = _parse(train)
    path = Path(location)
    if not path.is_file():
        return location
    for name in VALIDATION:
        for suffix in (path.suffix, *READERS):
            if (sibling := path.with_name(name + suffix)).is_file() and sibling != path:
                return str(sibling)
    raise ConfigError(
        f"data.validation: got None, and beside {path} there is no file named {', '.join(VALIDATION[:-1])} or "
        f"{VALIDATION[-1]}; pass --data.validation FILE, or --data.holdout 0.1 "
        "to set a tenth of the training examples apart"
    )
