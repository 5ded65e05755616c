"""Files as rows. What a cell says is what is read: no type is guessed, and no word stands for a missing value.

Cells of .csv and .tsv are strings. Values of .json and .jsonl keep their JSON types, and columns that Arrow has no one
type for are kept as JSON. A row is a line of .txt. Columns of .parquet have the types that the file declares.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from train.config import ConfigError
from train.data.lines import stream

BATCH = 10_000
"""Rows that are converted at once."""

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class File:
    """A file of rows.

    Attributes:
      path: where it lies.
      name: how it is called in messages; it ends as the file does.
    """

    path: Path
    name: str

    @property
    def suffix(self) -> str:
        """What tells its format: ``.csv`` of ``rows.csv.gz``."""
        *_, before, last = "", "", *(suffix.lower() for suffix in Path(self.name).suffixes)
        return before if last in _OPEN and before != ".parquet" else last

    def open(self) -> BinaryIO:
        return _OPEN.get(Path(self.name).suffix.lower(), open)(self.path, "rb")

    def lines(self) -> Iterator[str]:
        """Its lines with what ends them."""
        with self.open() as opened:
            yield from stream(opened, self.name)


def read_tables(
    files: Sequence[File], *, quoted_tsv: bool = False, features: datasets.Features | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of files, as tables of one schema with the number of the file that each is from.

    Args:
      quoted_tsv: whether cells of .tsv may stand in quotes, as those of .csv may.
      features: the types that columns are declared to have.

    Raises:
      ConfigError: naming file and row, if a file is not what its name says, or its columns are not those of the others.
    """
    kinds = json_types(files) if features is None and any(_is_json(file) for file in files) else {}
    schema: pa.Schema | None = None
    for number, file in enumerate(files):
        if _is_json(file):
            tables = _json(file, kinds, features)
        elif file.suffix == ".txt":
            tables = _text(file)
        elif file.suffix == ".parquet":
            tables = _parquet(file)
        else:
            tables = _delimited(file, "\t" if file.suffix == ".tsv" else ",", file.suffix == ".csv" or quoted_tsv)
        for table in tables:
            schema = schema or (table.schema if features is None else features.arrow_schema)
            yield number, _fitted(table, schema, file)


def _is_json(file: File) -> bool:
    return file.suffix in (".json", ".jsonl")


def _fitted(table: pa.Table, schema: pa.Schema, file: File) -> pa.Table:
    """A table with the columns and types that the others have."""
    if table.schema.equals(schema, check_metadata=True):
        return table
    if set(table.column_names) != set(schema.names):
        raise ConfigError(
            f"{file.name}: got the columns {', '.join(table.column_names)}, expected {', '.join(schema.names)}, which "
            "the other files have, or which are declared"
        )
    try:
        return table_cast(table, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file.name}: its values are not of the types that the other files have, or which are declared: {error}"
        ) from error


# Lines of text


def _text(file: File) -> Iterator[pa.Table]:
    ended = (line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line for line in file.lines())
    for batch in _batches(ended):
        yield pa.table({"text": pa.array(batch, pa.string())})


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


# Cells between commas or tabs


def _delimited(file: File, delimiter: str, quoted: bool) -> Iterator[pa.Table]:
    rows = _records(file, delimiter, quoted)
    names = next(rows, None)
    if names is None:
        return
    _check_names(names, file, delimiter)
    for batch in _batches(rows):
        yield pa.table([pa.array(cells, pa.string()) for cells in zip(*batch, strict=True)], names=names)


def _records(file: File, delimiter: str, quoted: bool) -> Iterator[list[str]]:
    """The names of the columns, and the cells of each row, which are as many; blank lines are no rows."""
    csv.field_size_limit(2**31 - 1)  # a cell may be a book
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(file.lines(), delimiter=delimiter, quoting=quoting, strict=True)
    columns, row = 0, 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{file.name}, row {row}" if columns else f"{file.name}, the header"
            raise ConfigError(f"{where} (line {line}): {_fault(str(error))}") from error
        if not cells:
            continue
        if columns and len(cells) != columns:
            what = "tab" if delimiter == "\t" else "comma"
            advice = f"quote cells that hold a {what}, and take out one at the end of the line" if quoted else (
                "a tab inside a cell cannot be told from one between two; --data.quoted-tsv reads quoted cells"
            )  # fmt: skip
            raise ConfigError(
                f"{file.name}, row {row} (line {line}): got {len(cells)} cells, expected {columns}, as many as the "
                f"header has; {advice}"
            )
        columns, row = columns or len(cells), row + 1
        yield cells


def _fault(error: str) -> str:
    if "end of data" in error:
        return "a quote is opened here and never closed; write two quotes for one inside a quoted cell"
    if "new-line character" in error:
        return r"a line ends in \r alone, expected \n or \r\n; quote cells that hold line ends"
    return f"{error}; write two quotes for one inside a quoted cell, and nothing after its last quote"


def _check_names(names: list[str], file: File, delimiter: str) -> None:
    """Only the first column may have no name: pandas writes its index so. A comma too much at the end is refused."""
    if twice := sorted({name for name in names if names.count(name) > 1 and name}):
        raise ConfigError(f"{file.name}: the header has {', '.join(map(repr, twice))} twice; rename one of them")
    if len(names) == 1 and (others := [(one, advice) for one, advice in _DELIMITERS.items() if one in names[0]]):
        raise ConfigError(
            f"{file.name}: the header is one column, {names[0]!r}: expected columns divided by {delimiter!r}, got "
            f"{others[0][0]!r}; {others[0][1]}"
        )
    if unnamed := [i for i, name in enumerate(names, 1) if not name and i > 1]:
        raise ConfigError(
            f"{file.name}: column {unnamed[0]} of {len(names)} has no name in the header; name it, or take out the "
            "delimiter that is too much"
        )


_DELIMITERS = {";": "save the file with commas", "\t": "name the file .tsv", ",": "name the file .csv"}


# JSON


def _json(
    file: File, kinds: Mapping[str, pa.DataType | None], features: datasets.Features | None
) -> Iterator[pa.Table]:
    for batch in _batches(row for _, row in _objects(file)):
        if features is None:
            yield pa.table({name: _json_array([row.get(name) for row in batch], kind) for name, kind in kinds.items()})
            continue
        values = {name: [row.get(name) for row in batch] for name in features}
        try:
            yield datasets.Dataset.from_dict(values, features=features).data.table
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
            raise ConfigError(f"{file.name}: its values are not of the types that are declared: {error}") from error


def _json_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    if kind is not None:
        return pa.array(values, kind)
    written = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(), written)


def json_types(files: Iterable[File]) -> dict[str, pa.DataType | None]:
    """The type of each column of all of these files; None for one that is kept as JSON."""
    shapes: dict[str, set[Any]] = {}
    for file in files:
        for batch in _batches(row for _, row in _objects(file)):
            for name in dict.fromkeys(name for row in batch for name in row):
                shapes.setdefault(name, set()).update(_shapes(row.get(name) for row in batch))
    return {name: _arrow_type(found) for name, found in shapes.items()}


def _shapes(values: Iterable[Any]) -> set[Any]:
    """What values are: names of types, and for lists what is in them."""
    values, found = list(values), set()
    for kind in set(map(type, values)):
        if kind is int:
            largest = max(abs(value) for value in values if type(value) is int)
            found.add("int" if largest <= 2**53 else "long" if largest < 2**63 else "huge")
        elif kind is list:
            found.add(frozenset(_shapes(itertools.chain.from_iterable(v for v in values if type(v) is list))))
        elif kind is not type(None):
            found.add(kind.__name__)
    return found


def _arrow_type(shapes: set[Any]) -> pa.DataType | None:
    """The type that holds all of these values exactly; None if there is none."""
    lists = [one for one in shapes if isinstance(one, frozenset)]
    if lists:
        inner = _arrow_type(set().union(*lists)) if len(lists) == len(shapes) else None
        return None if inner is None else pa.list_(inner)
    for names, kind in _TYPES:
        if shapes <= names:
            return kind
    return None


_TYPES = (
    (frozenset(), pa.null()),
    ({"str"}, pa.string()),
    ({"bool"}, pa.bool_()),
    ({"int", "long"}, pa.int64()),
    ({"int", "float"}, pa.float64()),
)


def _objects(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, with their place: an object on each line, or a list of objects."""
    rows = file.lines()
    blank: list[str] = []
    first = next((line for line in rows if line.strip() or blank.append(line)), "")
    whole = first.lstrip().startswith("[") or file.suffix == ".json" and not _is_object(first)
    if whole:
        yield from _listed(_parsed("".join([*blank, first, *rows]), file.name), file.name)
        return
    for number, line in enumerate(itertools.chain([first], rows), len(blank) + 1):
        if line.strip():
            where = f"{file.name}, line {number}"
            yield where, _checked(_parsed(line, file.name, number), where)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str, name: str, line: int | None = None) -> Any:
    """The value of a text: of a file, or of a line in it."""
    where = name if line is None else f"{name}, line {line}"
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}, line {line or error.lineno}, character {error.colno}: expected JSON: "
            f"{error.msg.removesuffix(' at')}"
        ) from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _listed(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if all(isinstance(one, list) for one in value.values()):
            raise ConfigError(
                f"{name}: got one object with {', '.join(map(repr, value))}, expected a list of objects, such as "
                f'[{{"text": "..."}}]. If the rows are in one of these, take it out: jq .{next(iter(value), "rows")} '
                f"{name} > rows.json"
            )
        value = [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{name}, row {number}"
        yield where, _checked({"text": row} if isinstance(row, str) else row, where)


def _checked(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise ConfigError(f'{where}: got {json.dumps(row):.80}, expected an object, such as {{"text": "..."}}')


# Parquet


def _parquet(file: File) -> Iterator[pa.Table]:
    try:
        opened = pq.ParquetFile(file.path)
        schema = datasets.Features.from_arrow_schema(opened.schema_arrow).arrow_schema
        cast = functools.partial(table_cast, schema=schema)
        yield from (cast(pa.Table.from_batches([batch])) for batch in opened.iter_batches(BATCH // 10))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{file.name} cannot be read as Parquet: {error}") from error
