"""Text files in, decoded lines out: encoding, compression, line endings."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, TypeVar

from train.config import ConfigError

T = TypeVar("T")

BATCH = 10_000
"""Rows per conversion."""

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class File:
    """A file of rows.

    Attributes:
      path: where it is stored.
      name: its name in messages, with the suffixes of its format and compression.
    """

    path: Path
    name: str

    @property
    def suffix(self) -> str:
        """The suffix of its format: ``.csv`` for ``rows.csv.gz``."""
        *_, before, last = "", "", *(suffix.lower() for suffix in Path(self.name).suffixes)
        return before if last in _OPEN and before != ".parquet" else last

    def open(self) -> BinaryIO:
        return _OPEN.get(Path(self.name).suffix.lower(), open)(self.path, "rb")

    def lines(self) -> Iterator[str]:
        """Its lines, with their line endings; see `decode`."""
        with self.open() as opened:
            for number, line in enumerate(opened, 1):
                yield decode(line, self.name, number)


def decode(content: bytes, name: str, first: int = 1) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
      name: the file's name, for errors.
      first: the number of the first line in ``content``; only a file's first line may have a byte order mark.

    Raises:
      ConfigError: if it is not UTF-8 or contains a NUL byte, with the line.
    """
    try:
        text = content.decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        utf16 = first == 1 and content.startswith((b"\xff\xfe", b"\xfe\xff"))
        line = first + content.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{name}, line {line}: expected UTF-8, got "
            f"{'the byte order mark of UTF-16' if utf16 else f'the byte 0x{content[error.start]:02x}'}. Convert it "
            f"first, for example from {'UTF-16' if utf16 else 'Latin-1'}: "
            f"iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8 {quote(name)} > {quote(f'utf8-{Path(name).name}')}"
        ) from error
    if (at := text.find("\0")) >= 0:
        line = first + text.count("\n", 0, at)
        raise ConfigError(f"{name}, line {line}: expected text in UTF-8, got a NUL byte: is it UTF-16, or not text?")
    return text


def split_lines(text: str) -> list[str]:
    r"""The lines of a text. Only \n and \r\n end a line; other separators, such as U+2028, stay in it."""
    found = text.replace("\r\n", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found


def in_batches(rows: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """The rows in lists of ``size``; the last one may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
