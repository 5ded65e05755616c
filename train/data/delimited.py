"""Files of .csv and .tsv in, Arrow tables of strings out."""

from __future__ import annotations

import csv
from collections.abc import Iterator

import pyarrow as pa

from train.config import ConfigError
from train.data.lines import File, in_batches

_DELIMITERS = {";": "save the file with commas", "\t": "name the file .tsv", ",": "name the file .csv"}


def delimited_tables(file: File, delimiter: str, quoted: bool) -> Iterator[pa.Table]:
    """The rows of a file whose first record is the header.

    Args:
      quoted: whether cells may be quoted; otherwise a quote is an ordinary character.

    Raises:
      ConfigError: with file, row and line, if the header or a row is malformed.
    """
    rows = _records(file, delimiter, quoted)
    names = next(rows, None)
    if names is None:
        return
    _check_header(names, file, delimiter)
    for batch in in_batches(rows):
        yield pa.table([pa.array(cells, pa.string()) for cells in zip(*batch, strict=True)], names=names)


def _records(file: File, delimiter: str, quoted: bool) -> Iterator[list[str]]:
    """The header, then the cells of each row, with their number checked; skips blank lines."""
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
            raise ConfigError(f"{where} (line {line}): {_csv_fault(str(error))}") from error
        if not cells:
            continue
        if columns and len(cells) != columns:
            advice = "a tab inside a cell looks like a delimiter; --data.quoted-tsv reads quoted cells"
            if quoted:
                name = "tab" if delimiter == "\t" else "comma"
                advice = f"quote cells that contain a {name}, and remove a {name} at the end of the line"
            raise ConfigError(
                f"{file.name}, row {row} (line {line}): got {len(cells)} cells, expected {columns}, as in the header; "
                f"{advice}"
            )
        columns, row = columns or len(cells), row + 1
        yield cells


def _csv_fault(error: str) -> str:
    if "end of data" in error:
        return "a quote is opened here and never closed; write two quotes for one inside a quoted cell"
    if "new-line character" in error:
        return r"a line ends in \r alone, expected \n or \r\n; quote cells that hold line endings"
    return f"{error}; write two quotes for one inside a quoted cell, and nothing after its last quote"


def _check_header(names: list[str], file: File, delimiter: str) -> None:
    """Only the first column may lack a name (pandas' index); elsewhere that means a trailing delimiter."""
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise ConfigError(f"{file.name}: the header has {', '.join(map(repr, repeated))} twice; rename one of them")
    if len(names) == 1 and (others := [(one, advice) for one, advice in _DELIMITERS.items() if one in names[0]]):
        raise ConfigError(
            f"{file.name}: the header is one column, {names[0]!r}: expected columns separated by {delimiter!r}, got "
            f"{others[0][0]!r}; {others[0][1]}"
        )
    if unnamed := [i for i, name in enumerate(names, 1) if not name and i > 1]:
        raise ConfigError(
            f"{file.name}: column {unnamed[0]} of {len(names)} has no name in the header; name it, or remove the extra "
            "delimiter"
        )
