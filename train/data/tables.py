"""The sources of a configuration in, tables and their checked columns out."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pyarrow as pa

from jlora.messages import nearest
from train.config import ConfigError, DataConfig
from train.data.arrow_cache import READERS
from train.data.sources import Provenance, find_validation, is_file, read_source, source_digest

SLICE = 10_000
"""Rows of a column that are read at once."""


class Table(datasets.Dataset):
    """Rows that keep their provenance through selections.

    Attributes:
      provenance: their origin; None for rows not read from a source.
      rows: the index of each row in the source, int [n].
      content: a digest of the rows' values and their order; empty for rows not read from a source.
    """

    provenance: Provenance | None = None
    rows: np.ndarray | None = None
    content: str = ""

    @classmethod
    def from_dict(cls, *args: Any, **options: Any) -> Table:
        made: Any = super().from_dict(*args, **options)
        return made

    @classmethod
    def from_source(cls, dataset: datasets.Dataset, provenance: Provenance, quoted_tsv: bool) -> Table:
        table = cls(dataset.data, info=dataset.info, split=dataset.split)
        table.provenance, table.rows = provenance, np.arange(len(table))
        suffixes = [Path(name).suffixes for name in provenance.files]
        read = [READERS, provenance.digest, provenance.split, suffixes, quoted_tsv, str(table.features)]
        table.content = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        return table

    def select(self, indices: Iterable[int], *args: Any, **options: Any) -> Table:  # pyright: ignore
        indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), np.int64)
        found: Any = super().select(indices, *args, **options)
        found.__class__ = Table
        found.provenance, found.rows = self.provenance, None if self.rows is None else self.rows[indices]
        found.content = self.content and hashlib.sha256(self.content.encode() + indices.tobytes()).hexdigest()
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
    table = Table.from_source(rows, provenance, quoted_tsv)
    if provenance.split is None or not is_file(provenance):
        return table
    if "split" not in table.column_names:
        raise ConfigError(
            f"{field}: {provenance.source} has no column `split`, by which :{provenance.split} would choose rows"
        )
    values, numbers, _ = _distinct(table, "split")
    chosen = np.flatnonzero(np.isin(numbers, [i for i, value in enumerate(values) if value == provenance.split]))
    if not len(chosen):
        raise ConfigError(f"{field}: {provenance.source} has no row whose split is {provenance.split!r}")
    return table.keep(chosen, "in other splits")


def data_digests(config: DataConfig) -> list[str | None]:
    """The digests of the training and the validation source; None unless it is a local file or folder."""
    try:
        validation = config.validation or find_validation(config.train)[0]
    except ConfigError:
        return [source_digest(config.train), None]
    return [source_digest(config.train), source_digest(validation)]


class Column(Sequence[Any]):
    """A column's values, unchecked: some may be missing. They are read in slices, and never all in memory.

    Args:
      convert: applied to each value.
    """

    def __init__(self, table: datasets.Dataset, name: str, convert: Callable[[Any], Any] | None = None):
        self._json, self._convert = isinstance(table.features[name], datasets.Json), convert
        rows: Any = table.select_columns([name])
        self._rows, self._name = rows.with_format("arrow") if self._json else rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        if not isinstance(row, slice):
            row = range(len(self))[row]
            return self[row : row + 1][0]
        values: Any = self._rows[row][self._name]
        if self._json:  # the parser that datasets uses for JSON rounds numbers
            written = (text for chunk in values.chunks for text in chunk.storage.to_pylist())
            values = [None if text is None else json.loads(text) for text in written]
        return values if self._convert is None else list(map(self._convert, values))

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), SLICE):
            yield from self[start : start + SLICE]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Distinct(Sequence[Any]):
    """A column of few distinct values.

    Attributes:
      values: the distinct ones, in the order of their first rows.
      numbers: the index of each row's value among them, int64 [n].
    """

    def __init__(self, values: Sequence[Any], numbers: np.ndarray):
        self.values, self.numbers = values, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: Any) -> Any:
        return self.values[int(self.numbers[row])]

    def map(self, convert: Callable[[Any], Any]) -> Distinct:
        """The column with each value converted."""
        return Distinct([convert(value) for value in self.values], self.numbers)

    def rows(self, chosen: Callable[[Any], bool]) -> list[int]:
        """The rows whose value is chosen."""
        return np.flatnonzero(np.isin(self.numbers, [i for i, one in enumerate(self.values) if chosen(one)])).tolist()


def column(table: Table, name: str, field: str) -> Column:
    """A column's values, checked: none is missing, and all are of one kind that the field accepts.

    Args:
      field: the configuration's field with the column's name, for errors.

    Raises:
      ConfigError: if there is no such column; with rows, if values are missing (an empty label counts as missing), if
        they are of several kinds, or of one that the field does not accept: dates, bytes, and for labels lists and
        objects.
    """
    _check_exists(table, name, field)
    values, missing, kinds = Column(table, name), list[int](), dict[str, int]()
    for row, value in enumerate(values):
        if _is_missing(value, field):
            missing.append(row)
        kinds.setdefault(_kind(type(value)), row)
    _check(table, name, field, values, missing, kinds)
    return values


def distinct(table: Table, name: str, field: str) -> Distinct:
    """As `column`, for a column of few distinct values: no value is read twice."""
    _check_exists(table, name, field)
    values, numbers, firsts = _distinct(table, name)
    found, kinds = Distinct(values, numbers), dict[str, int]()
    for value, row in zip(values, firsts, strict=True):
        kinds.setdefault(_kind(type(value)), row)
    _check(table, name, field, found, found.rows(lambda value: _is_missing(value, field)), kinds)
    return found


def texts(table: Table, name: str, field: str) -> Column:
    """A column's values as text, exactly as written; whole numbers count as text.

    Raises:
      ConfigError: as `column`; with the row, if a value is neither.
    """
    for row, value in enumerate(column(table, name, field)):
        if type(value) not in (str, int):
            _raise_unfit(table, name, field, row, value, "expected text")
    return Column(table, name, str)


def _distinct(table: Table, name: str) -> tuple[list[Any], np.ndarray, list[int]]:
    """``(values, numbers, first rows)``, see `Distinct`."""
    found: dict[Any, int] = {}
    firsts, numbers = list[int](), np.empty(len(table), np.int64)
    values = Column(table, name)
    if pa.types.is_nested(table.features.arrow_schema.field(name).type):
        keys: Any = (json.dumps(value, default=repr) for value in values)
        for row, key in enumerate(keys):
            numbers[row] = found.setdefault(key, row)
        firsts = list(found.values())
        return [values[row] for row in firsts], np.searchsorted(firsts, numbers), firsts
    rows: Any = table.select_columns([name]).with_format("arrow")
    for start in range(0, len(table), SLICE):
        part = rows[start : start + SLICE].column(name).combine_chunks()
        part = (part.storage if isinstance(part, pa.ExtensionArray) else part).dictionary_encode("encode")
        here = part.indices.to_numpy()
        own = []
        for i, key in enumerate(part.dictionary.to_pylist()):
            if key not in found:
                firsts.append(start + int(np.argmax(here == i)))
            own.append(found.setdefault(key, len(found)))
        numbers[start : start + len(here)] = np.asarray(own)[here]
    return [values[row] for row in firsts], numbers, firsts


def _check_exists(table: Table, name: str, field: str) -> None:
    if name not in table.column_names:
        advice = "rename the column" if field == "file" else f"pass --{field.replace('_', '-')} and one of them"
        source = "it" if table.provenance is None else table.provenance.source
        raise ConfigError(
            f"{field}: the data has no column {name!r}{nearest(name, table.column_names)}; {source} has "
            f"{', '.join(table.column_names)}; {advice}"
        )


def _check(
    table: Table, name: str, field: str, values: Sequence[Any], missing: Sequence[int], kinds: Mapping[str, int]
) -> None:
    """Raises the errors of `column`, given the missing rows, and the first row of each kind."""
    if missing:
        raise ConfigError(
            f"{field}: {len(missing)} of {len(values)} values of the column {name!r} are missing, in "
            f"{table.locate(missing)}; remove these rows"
        )
    for kind, row in kinds.items():
        if kind in _UNFIT.get(field, _UNFIT[""]):
            advice = "expected a name or a number" if field == "task.label" else ""
            _raise_unfit(table, name, field, row, values[row], advice)
    if len(kinds) > 1:
        (one, first), (other, row), *_ = kinds.items()
        advice = f"expected {one} in all rows, as in {table.locate([first])} ({values[first]!r:.60})"
        _raise_unfit(table, name, field, row, values[row], advice)


def _is_missing(value: Any, field: str) -> bool:
    # pandas writes NaN for a missing value.
    if isinstance(value, str):
        return value == "" and field == "task.label"
    return value is None or isinstance(value, float) and math.isnan(value)


def _raise_unfit(table: Table, name: str, field: str, row: int, value: Any, advice: str) -> NoReturn:
    advice = advice and f"{advice}; "
    raise ConfigError(
        f"{field}: the column {name!r} holds {_kind(type(value))} in {table.locate([row])}: {value!r:.80}; {advice}"
        "write it as text, or name another column"
    )


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
