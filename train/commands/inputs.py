"""Inputs of predict and generate: texts from flags, the lines of a text file, or a column of a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from jlora.messages import nearest
from train.config import ConfigError, TrainConfig
from train.data import tables
from train.data.lines import decode, split_lines
from train.messages import bulleted

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunPaths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN...]")]

TEXT_FILES = ("", ".txt")
"""Suffixes of files with one text per line; other files are tables."""
MAX_NAMED = 8
"""The maximum number of inputs listed in an error; it counts the others."""


class Inputs(NamedTuple):
    """The inputs, in order.

    Attributes:
      rows: the values of the columns for each input: texts, or other values of a table. None for a blank input.
      source: the file, or None for texts from flags.
      unit: the word for an input: text, line or row; inputs are counted from 1.
      more: the other columns that were asked for and that the table has, by name: a value for each input.
    """

    rows: list[tuple[Any, ...] | None]
    source: str | None
    unit: str
    more: Mapping[str, Sequence[Any]]

    def where(self, i: int) -> str:
        """The place of an input, for errors."""
        return f"{'' if self.source is None else f'{self.source}, '}{self.unit} {i + 1}"

    @property
    def not_blank(self) -> list[int]:
        """The indices of the inputs that are not blank."""
        return [i for i, row in enumerate(self.rows) if row is not None]


def read_inputs(
    texts: Sequence[str],
    file: Path | None,
    columns: Sequence[str],
    config: TrainConfig,
    *,
    flag: str,
    by_column: bool,
    more: Sequence[str | None] = (),
) -> Inputs:
    """The inputs of a command.

    Args:
      texts: from flags.
      file: a file instead, or ``-`` for the lines of standard input.
      columns: of a table. In texts and lines, a tab separates the two columns.
      config: of the run; determines how tables are read.
      flag: the name of the flag for texts.
      by_column: whether ``--column`` set the first column.
      more: other columns to read, if the table has them.

    Raises:
      ConfigError: if there is no input, or more than one source; if a file cannot be read, or a value in it is not a
        text, with file and row.
    """
    if texts and file is not None:
        raise ConfigError(f"got {flag} and --file; expected one of them")
    if not texts and file is None:
        raise ConfigError(f'no text; pass {flag} "..." (repeatable), or --file FILE, or --file - to pipe')
    if file is not None and file.suffix not in TEXT_FILES:
        found = _read_table(file, columns, config, by_column=by_column, more=more)
    elif by_column:
        raise ConfigError(f"got --column with {file or flag}, which has no columns; omit it")
    else:
        found = _read_lines(texts, file, columns)
    if not found.not_blank:
        raise ConfigError(f"{found.source or flag}: no texts; expected at least one that is not blank")
    return found


def text_of(value: Any, where: str) -> str:
    """A table's value as text: strings and whole numbers count as text.

    Raises:
      ConfigError: for anything else.
    """
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{where}: got {value!r:.80}; expected text. Pass --column with the column of the texts")


def check_no_errors(errors: Mapping[int, str], inputs: Inputs, advice: str) -> None:
    """Raises a ConfigError listing the inputs with ``errors``, given by index, if any."""
    if errors:
        named = bulleted([f"{inputs.where(i)}: {error}" for i, error in errors.items()], MAX_NAMED)
        raise ConfigError(f"{len(errors)} of {len(inputs.rows)} texts cannot be used:{named}\n{advice}")


def _read_lines(texts: Sequence[str], file: Path | None, columns: Sequence[str]) -> Inputs:
    name = "standard input" if str(file) == "-" else str(file)
    if file is not None:
        texts = split_lines(decode(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes(), name))
    rows = [tuple(text.split("\t")) if len(columns) > 1 else (text,) for text in texts]
    found = Inputs(_without_blanks(rows), None if file is None else name, "text" if file is None else "line", {})
    if wrong := [found.where(i) for i, row in enumerate(found.rows) if row is not None and len(row) != len(columns)]:
        named = ", ".join(wrong[:MAX_NAMED]) + (f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else "")
        raise ConfigError(f"expected {' and '.join(columns)} with exactly one tab between them; got others in {named}")
    return found


def _read_table(
    file: Path, columns: Sequence[str], config: TrainConfig, *, by_column: bool, more: Sequence[str | None]
) -> Inputs:
    if not file.exists() and ":" not in file.name:
        others = sorted(str(one) for one in file.parent.glob("*") if one.is_file())
        raise ConfigError(f"no file at {file}{nearest(str(file), others)}")
    table = tables.read(str(file), config.cache_dir, "file", quoted_tsv=config.data.quoted_tsv)
    if not by_column and columns[0] not in table.column_names:
        raise ConfigError(
            f"{file} has no column {columns[0]!r}, which the run was trained on; it has "
            f"{', '.join(table.column_names)}; pass --column with one of them"
        )
    try:
        fields = ("column", *["file"] * (len(columns) - 1))
        values = [tables.column(table, name, field) for name, field in zip(columns, fields, strict=True)]
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    others = {name: tables.Column(table, name) for name in more if name in table.column_names}
    return Inputs(_without_blanks(list(zip(*values, strict=True))), str(file), "row", others)


def _without_blanks(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...] | None]:
    """The rows, with None for those whose values are all blank."""
    return [None if all(isinstance(one, str) and not one.strip() for one in row) else row for row in rows]
