"""The sources of a configuration in, tables and their checked columns out."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np

from jlora.messages import nearest
from train.config import ConfigError, DataConfig
from train.data.sources import Provenance, find_validation, is_file, read_source, source_digest


class Table(datasets.Dataset):
    """Rows that keep their provenance through selections.

    Attributes:
      provenance: their origin; None for rows not read from a source.
      rows: the index of each row in the source, int [n].
    """

    provenance: Provenance | None = None
    rows: np.ndarray | None = None

    @classmethod
    def from_dict(cls, *args: Any, **options: Any) -> Table:
        made: Any = super().from_dict(*args, **options)
        return made

    @classmethod
    def from_source(cls, dataset: datasets.Dataset, provenance: Provenance) -> Table:
        table = cls(dataset.data, info=dataset.info, split=dataset.split)
        table.provenance, table.rows = provenance, np.arange(len(table))
        return table

    def select(self, indices: Iterable[int], *args: Any, **options: Any) -> Table:  # pyright: ignore
        indices = np.asarray(list(indices), np.int64)
        found: Any = super().select(indices, *args, **options)
        found.__class__ = Table
        found.provenance, found.rows = self.provenance, None if self.rows is None else self.rows[indices]
        return found

    def keep(self, indices: Sequence[int] | np.ndarray, why: str) -> Table:
        """Keep only these rows; the provenance counts the others as dropped, with the reason ``why``."""
        found = self.select(indices)
        if self.provenance is not None:
            dropped = {**self.provenance.dropped, why: len(self) - len(found)}
            found.provenance = dataclasses.replace(self.provenance, dropped={k: n for k, n in dropped.items() if n})
        return found

    def count_dropped(self, count: int, why: str) -> None:
        """Count rows that a task does not use in the provenance."""
        if self.provenance is not None and count:
            self.provenance.dropped[why] = self.provenance.dropped.get(why, 0) + count

    def locate(self, rows: Sequence[int], most: int = 5) -> str:
        """The rows' places in their files, such as ``rows 2, 7 of train.csv``; counted from 1, without the header."""
        name, numbers = "", [row + 1 for row in rows]
        if self.provenance is not None and self.rows is not None:
            files = self.provenance.files or {self.provenance.source: self.provenance.read}
            places = self.rows[list(rows)]
            starts = np.cumsum([0, *files.values()])
            first = int(np.searchsorted(starts, places[0], side="right")) - 1
            # # With several files, name only the first one with such a row.
            places = np.sort(places[(places >= starts[first]) & (places < starts[first + 1])])
            name, numbers = f" of {list(files)[first]}", [int(place - starts[first]) + 1 for place in places]
        shown = [f"{number:,}" for number in numbers[:most]]
        rest = f" and {len(rows) - len(shown):,} more" if len(rows) > len(shown) else ""
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(shown)}{name}{rest}"


def load(config: DataConfig, cache_dir: Path) -> dict[str, Table]:
    """The training and the validation table, each with its provenance.

    Rows are memory-mapped from Arrow files in ``cache_dir``, keyed by content; only datasets on the hub are
    downloaded.

    Returns:
      ``{"train": table, "validation": table}``

    Raises:
      ConfigError: if a source does not exist, cannot be read or is empty, or if there is no validation data.
    """
    train = read(config.train, cache_dir, "data.train", quoted_tsv=config.quoted_tsv)
    # Files are often sorted. The choice does not depend on the run's seed, so runs stay comparable.
    order = np.random.default_rng(0).permutation(len(train))
    if config.validation is None and config.holdout:
        apart = round(config.holdout * len(train))
        if not 0 < apart < len(train):
            raise ConfigError(
                f"data.holdout: {config.holdout} of {len(train)} training examples are {apart}; expected at least one "
                "on each side. Pass another --data.holdout, or --data.validation FILE"
            )
        validation = train.keep(order[:apart], "used for training")
        train, order = train.keep(order[apart:], "held out for validation"), np.arange(len(train) - apart)
    else:
        source, found = (config.validation, None) if config.validation else find_validation(config.train)
        validation = read(source, cache_dir, "data.validation", found=found, quoted_tsv=config.quoted_tsv)
    if config.limit is not None and config.limit < len(train):
        train = train.keep(order[: config.limit], f"beyond the limit of {config.limit:,}")
    if config.validation_limit is not None:
        first = range(min(config.validation_limit, len(validation)))
        validation = validation.keep(first, f"beyond the limit of {config.validation_limit:,}")
    return {"train": train, "validation": validation}


def read(source: str, cache_dir: Path, field: str, *, found: str | None = None, quoted_tsv: bool = False) -> Table:
    """The rows of one source.

    Args:
      source, quoted_tsv: see `train.config.DataConfig`.
      field: the configuration's field with the source, for errors.
      found: how the source was found; None if it was configured.

    Raises:
      ConfigError: as `load`.
    """
    rows, provenance = read_source(source, cache_dir, field, found, quoted_tsv)
    table = Table.from_source(rows, provenance)
    if provenance.split is None or not is_file(provenance):
        return table
    if "split" not in table.column_names:
        raise ConfigError(
            f"{field}: {provenance.source} has no column `split`, by which :{provenance.split} would choose rows"
        )
    chosen = [i for i, value in enumerate(cells(table, "split")) if value == provenance.split]
    if not chosen:
        raise ConfigError(f"{field}: {provenance.source} has no row whose split is {provenance.split!r}")
    return table.keep(chosen, "in other splits")


def data_digests(config: DataConfig) -> list[str | None]:
    """The digests of the training and the validation source; None unless it is a local file or folder."""
    try:
        validation = config.validation or find_validation(config.train)[0]
    except ConfigError:
        return [source_digest(config.train), None]
    return [source_digest(config.train), source_digest(validation)]


def column(table: Table, name: str, field: str) -> list[Any]:
    """A column's values, checked: none is missing, and all are of one kind that the field accepts.

    Args:
      field: the configuration's field with the column's name, for errors.

    Raises:
      ConfigError: if there is no such column; with rows, if values are missing (an empty label counts as missing), if
        they are of several kinds, or of one that the field does not accept: dates, bytes, and for labels lists and
        objects.
    """
    if name not in table.column_names:
        advice = "rename the column" if field == "file" else f"pass --{field.replace('_', '-')} and one of them"
        source = "it" if table.provenance is None else table.provenance.source
        raise ConfigError(
            f"{field}: the data has no column {name!r}{nearest(name, table.column_names)}; {source} has "
            f"{', '.join(table.column_names)}; {advice}"
        )
    values, empty = cells(table, name), "" if field == "task.label" else None
    if missing := [i for i, value in enumerate(values) if _is_missing(value, empty)]:
        raise ConfigError(
            f"{field}: {len(missing)} of {len(values)} values of the column {name!r} are missing, in "
            f"{table.locate(missing)}; remove these rows"
        )
    rows: dict[str, int] = {}
    for row, value in enumerate(values):
        rows.setdefault(_kind(type(value)), row)
    for kind, row in rows.items():
        if kind in _UNFIT.get(field, _UNFIT[""]):
            _raise_unfit(table, name, field, row, values[row], "expected a name or a number" if empty == "" else "")
    if len(rows) > 1:
        (one, first), (other, row), *_ = rows.items()
        advice = f"expected {one} in all rows, as in {table.locate([first])} ({values[first]!r:.60})"
        _raise_unfit(table, name, field, row, values[row], advice)
    return values


def _is_missing(value: Any, empty: str | None) -> bool:
    # pandas writes NaN for a missing value.
    return value is None or isinstance(value, str) and value == empty or isinstance(value, float) and math.isnan(value)


def texts(table: Table, name: str, field: str) -> list[str]:
    """A column's values as text, exactly as written; whole numbers count as text.

    Raises:
      ConfigError: as `column`; with the row, if a value is neither.
    """
    values = column(table, name, field)
    for row, value in enumerate(values):
        if type(value) not in (str, int):
            _raise_unfit(table, name, field, row, value, "expected text")
    return [str(value) for value in values]


def _raise_unfit(table: Table, name: str, field: str, row: int, value: Any, advice: str) -> NoReturn:
    advice = advice and f"{advice}; "
    raise ConfigError(
        f"{field}: the column {name!r} holds {_kind(type(value))} in {table.locate([row])}: {value!r:.80}; {advice}"
        "write it as text, or name another column"
    )


def cells(table: datasets.Dataset, name: str) -> list[Any]:
    """A column's values, unchecked: some may be missing."""
    if not isinstance(table.features[name], datasets.Json):
        return table[name][:]
    # The parser that datasets uses for JSON rounds numbers.
    rows: Any = table.select_columns([name]).with_format("arrow")[:]
    written = (text for chunk in rows.column(name).chunks for text in chunk.storage.to_pylist())
    return [None if text is None else json.loads(text) for text in written]


@functools.cache
def _kind(kind: type) -> str:
    return next((name for kinds, name in _KINDS if issubclass(kind, kinds)), f"a {kind.__name__}")


_KINDS: tuple[tuple[Any, str], ...] = (
    (str, "text"),
    (bool, "true or false"),
    ((int, float, decimal.Decimal), "a number"),
    ((list, np.ndarray), "a list"),
    (dict, "an object"),
    ((datetime.date, datetime.time, datetime.timedelta), "a date or time"),
    (bytes, "bytes"),
)
_UNFIT = {
    "task.label": ("a list", "an object", "a date or time", "bytes"),
    "task.image": ("a date or time",),
    "": ("a date or time", "bytes"),
}
"""Kinds of values that a field does not accept; the last entry is for all other fields."""
