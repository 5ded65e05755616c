"""Columns of rows of different lengths: one flat array of values, which may be a memory-mapped file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from train.data.truncation import Truncation

OFFSETS, COUNTS = "offsets", "counts"


@dataclass(frozen=True)
class Kind:
    """How a ragged column is stored and padded.

    Attributes:
      fill: the padding value.
      dtype: of the stored values; None for a column of ones, such as an attention mask, which is not stored.
      left: whether padding precedes the values.
      counted: whether the number of ones after each row's first value is stored too: the tokens that carry loss.
    """

    fill: int = 0
    dtype: str | None = "int32"
    left: bool = False
    counted: bool = False


@dataclass(frozen=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """A column of int32 arrays [length] of different lengths, which batches pad.

    Attributes:
      kind: how it is stored and padded.
      values: of all rows, one after the other, [total].
      offsets: the start of each row in ``values``, and the end of the last one, int64 [n + 1].
      longest: the length of the longest row.
      largest: the largest value.
      counts: the number of ones after each row's first value, int32 [n]; None if they are not counted.
      truncation: the tokens cut from texts; None for other columns.
    """

    kind: Kind
    values: np.ndarray
    offsets: np.ndarray
    longest: int
    largest: int
    counts: np.ndarray | None = None
    truncation: Truncation | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], fill: int = 0, *, left: bool = False) -> Ragged:
        """A column of these rows, in memory."""
        with RaggedWriter({"": Kind(fill, left=left)}) as writer:
            writer.add({"": rows})
        return writer.columns()[""]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        row = range(len(self))[row]
        return np.asarray(self.values[self.offsets[row] : self.offsets[row + 1]], np.int32)

    def lengths(self, rows: Any = slice(None)) -> np.ndarray:
        """The lengths of these rows, int64 [rows]."""
        return self.offsets[1:][rows] - self.offsets[:-1][rows]

    def padded(self, rows: np.ndarray, length: int) -> np.ndarray:
        """These rows, padded to ``length``, int32 [rows, length]. Reads no other rows."""
        starts, own = self.offsets[rows], self.lengths(rows)
        ends = own.cumsum()
        where = np.repeat(starts - (ends - own), own) + np.arange(own.sum())
        places = np.arange(length)
        out = np.full((len(rows), length), self.kind.fill, np.int32)
        out[places >= length - own[:, None] if self.kind.left else places < own[:, None]] = self.values[where]
        return out


Examples: TypeAlias = Mapping[str, np.ndarray | Ragged]
"""Columns of one length by name."""


class RaggedWriter:
    """Writes ragged columns of the same lengths in parts, to memory or to files, which it closes as a context manager.

    Args:
      kinds: of the columns, by name.
      folder: for the files; None for memory.
    """

    def __init__(self, kinds: Mapping[str, Kind], folder: Path | None = None):
        self._kinds, self._end, self._longest = kinds, 0, 0
        self._largest = {name: int(kind.dtype is None) for name, kind in kinds.items()}
        self._flat = {name: _Flat(dtype, folder and folder / name) for name, dtype in _dtypes(kinds).items()}
        self._flat[OFFSETS].append(np.zeros(1, np.int64))

    def __enter__(self) -> RaggedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for flat in self._flat.values():
            flat.close()

    def add(self, part: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Add rows: those of each stored column by name; any column's lengths are those of all."""
        lengths = np.fromiter(map(len, next(iter(part.values()))), np.int64)
        ends = self._end + lengths.cumsum()
        self._end = int(ends[-1]) if len(ends) else self._end
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        self._flat[OFFSETS].append(ends)
        for name, rows in part.items():
            values = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
            self._largest[name] = max(self._largest[name], int(values.max(initial=0)))
            self._flat[name].append(values)
            if self._kinds[name].counted:
                counts = np.fromiter((sum(row) - sum(row[:1]) for row in rows), np.int32, len(rows))
                self._flat[COUNTS].append(counts)

    def columns(self, truncation: Truncation | None = None) -> dict[str, Ragged]:
        """All that was written, by name; from files, mapped to memory. Call it after the context."""
        flat = {name: flat.array() for name, flat in self._flat.items()}
        return _columns(self._kinds, flat, self._longest, self._largest, truncation)


def describe(columns: Mapping[str, Ragged]) -> dict[str, Any]:
    """What `load` needs besides the files, as JSON."""
    first = next(iter(columns.values()))
    return {
        "kinds": {name: dataclasses.asdict(column.kind) for name, column in columns.items()},
        "longest": first.longest,
        "largest": {name: column.largest for name, column in columns.items()},
        "truncation": None if first.truncation is None else first.truncation._asdict(),
    }


def load(folder: Path, described: Mapping[str, Any]) -> dict[str, Ragged]:
    """The columns that a `RaggedWriter` wrote to a folder, mapped to memory."""
    kinds = {name: Kind(**kind) for name, kind in described["kinds"].items()}
    cut = described["truncation"]
    flat = {name: mapped(folder / name, dtype) for name, dtype in _dtypes(kinds).items()}
    return _columns(kinds, flat, described["longest"], described["largest"], cut and Truncation(**cut))


def mapped(file: Path, dtype: str) -> np.ndarray:
    """The values of a file, mapped to memory, [n]."""
    if not file.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype, "r"))


def _dtypes(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The dtypes of the stored arrays, by name."""
    counted = any(kind.counted for kind in kinds.values())
    found = {name: kind.dtype for name, kind in kinds.items() if kind.dtype} | {OFFSETS: "int64"}
    return found | ({COUNTS: "int32"} if counted else {})


def _columns(
    kinds: Mapping[str, Kind],
    flat: Mapping[str, np.ndarray],
    longest: int,
    largest: Mapping[str, int],
    truncation: Truncation | None,
) -> dict[str, Ragged]:
    offsets, counts = flat[OFFSETS], flat.get(COUNTS)
    ones = np.broadcast_to(np.int32(1), (int(offsets[-1]),))  # takes no memory
    return {
        name: Ragged(
            kind,
            flat.get(name, ones),
            offsets,
            longest,
            largest[name],
            counts if kind.counted else None,
            truncation,
        )
        for name, kind in kinds.items()
    }


class _Flat:
    """An array that grows, in a file or in memory."""

    def __init__(self, dtype: str, file: Path | None):
        self._dtype, self._file = np.dtype(dtype), file
        self._parts: list[np.ndarray] = []
        self._stream = None if file is None else file.open("wb")

    def append(self, values: np.ndarray) -> None:
        values = values.astype(self._dtype)
        self._parts.append(values) if self._stream is None else values.tofile(self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def array(self) -> np.ndarray:
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._parts])
        return mapped(self._file, self._dtype.name)
