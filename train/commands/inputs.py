"""What the commands are asked about: texts given as flags, the lines of a text file, or a column of a table."""

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
from train.messages import bulleted, listed

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

LINES = ("", ".txt")
"""How the names of files end that hold a text on each line; others are tables."""


class Inputs(NamedTuple):
    """What was read, in its order.

    Attributes:
      rows: for each input the values of the columns that were asked for, texts or what else a table holds; None in
        place of a blank one.
      source: the file, or None where flags gave the texts.
      unit: what the rows are called; they are counted from 1.
      beside: for each input what one more column of the table holds, or None.
    """

    rows: list[tuple[Any, ...] | None]
    source: str | None
    unit: str
    beside: Sequence[Any]

    def where(self, i: int) -> str:
        """The place of an input, for errors."""
        return f"{'' if self.source is None else f'{self.source}, '}{self.unit} {i + 1}"

    @property
    def asked(self) -> list[int]:
        """The inputs that are not blank."""
        return [i for i, row in enumerate(self.rows) if row is not None]


def read_inputs(
    given: Sequence[str],
    file: Path | None,
    columns: Sequence[str],
    config: TrainConfig,
    *,
    flag: str,
    chosen: bool,
    beside: str | None = None,
) -> Inputs:
    """The inputs of a command.

    Args:
      given: texts that flags gave.
      file: a file of them instead, or ``-`` for the lines of the standard input.
      columns: of a table. In texts and lines a tab stands between what would be in two columns.
      config: of the run, which says how tables are read.
      flag: the name of the flag for texts.
      chosen: whether the first column was chosen by ``--column``.
      beside: a column that is read too where the table has it.

    Raises:
      ConfigError: if there are none, or several sources; a file cannot be read, or a value in it is no text, naming
        file and row.
    """
    if given and file is not None:
        raise ConfigError(f"got {flag} and --file; expected one of them")
    if not given and file is None:
        raise ConfigError(
            f'no text; pass {flag} "..." (several times for several), or --file FILE, or --file - to pipe'
        )
    if file is None or file.suffix in LINES:
        if chosen:
            raise ConfigError(f"got --column with {file or flag}, which has no columns; leave it out")
        texts = list(given) if file is None else split_lines(_content(file))
        source, unit = (None, "text") if file is None else (_name(file), "line")
        rows = [tuple(text.split("\t")) if len(columns) > 1 else (text,) for text in texts]
        found = Inputs([], source, unit, [None] * len(texts))
    else:
        rows, more = _table(file, columns, config, chosen=chosen, beside=beside)
        found = Inputs([], str(file), "row", more)
    rows = [None if all(_is_blank(value) for value in row) else row for row in rows]
    if wrong := [found.where(i) for i, row in enumerate(rows) if row is not None and len(row) != len(columns)]:
        raise ConfigError(
            f"expected {' and '.join(columns)} with one tab between them, got none or more in {listed(wrong, 8)}"
        )
    found = found._replace(rows=rows)
    if not found.asked:
        raise ConfigError(f"{found.source or flag}: there is no text in it, expected at least one that is not blank")
    return found


def text_of(value: Any, where: str) -> str:
    """A value of a table as a text: texts and whole numbers are.

    Raises:
      ConfigError: if it is anything else.
    """
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{where}: got {value!r:.80}; expected a text. Pass --column with the column of the texts")


def refuse_rows(faults: Mapping[int, str], inputs: Inputs, advice: str) -> None:
    """Raises a ConfigError that names every input which has a fault, if there is one."""
    if faults:
        wrong = bulleted([f"{inputs.where(i)}: {fault}" for i, fault in faults.items()], 8)
        raise ConfigError(f"{len(faults)} of {len(inputs.rows)} texts cannot be used:{wrong}\n{advice}")


def _content(file: Path) -> str:
    return decode(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes(), _name(file))


def _name(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


def _table(
    file: Path, columns: Sequence[str], config: TrainConfig, *, chosen: bool, beside: str | None
) -> tuple[list[tuple[Any, ...]], Sequence[Any]]:
    if not file.exists() and ":" not in file.name:
        others = sorted(str(one) for one in file.parent.glob("*") if one.is_file())
        raise ConfigError(f"there is no file at {file}{nearest(str(file), others)}")
    table = tables.read(str(file), config.cache_dir, "file", quoted_tsv=config.data.quoted_tsv)
    if not chosen and columns[0] not in table.column_names:
        raise ConfigError(
            f"{file} has no column {columns[0]!r}, from which the run was trained; it has "
            f"{', '.join(table.column_names)}; pass --column with one of them"
        )
    try:
        fields = ("column", *["file"] * (len(columns) - 1))
        values = [tables.column(table, name, field) for name, field in zip(columns, fields, strict=True)]
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    more = tables.cells(table, beside) if beside in table.column_names else [None] * len(table)
    return list(zip(*values, strict=True)), more


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()
