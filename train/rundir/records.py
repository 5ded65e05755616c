"""The records of a run: ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.compute import processes
from train.rundir.directory import DRAFT

Record = dict[str, Any]
"""``phase``, ``step`` (of the phase, from 1) and its metrics; at the end of an epoch also ``epoch``."""


class Records:
    """A file of records, written by the first process only; each new one also goes to ``beside``."""

    def __init__(self, file: Path, beside: Callable[[Record], None] = lambda _: None):
        self.file, self._beside = file, beside

    def cut(self, size: int, digest: str = "") -> None:
        """Keep the first ``size`` bytes of the file, and drop the rest.

        If their digest differs from the one returned by `sync`, prints that and keeps the readable records.
        """
        if not processes.is_first():
            return
        there = self.file.read_bytes() if self.file.is_file() else b""
        kept = there[:size]
        if size and _digest(kept) != digest:
            kept = b"".join(
                line for line in kept.splitlines(keepends=True) if line.endswith(b"\n") and parse_record(line)
            )
            print(
                f"{self.file} has changed since the checkpoint: of {size:,} bytes, {len(kept):,} of whole records are "
                "kept, the others are lost"
            )
        draft = self.file.with_name(self.file.name + DRAFT)
        draft.write_bytes(kept)
        os.replace(draft, self.file)

    def write(self, record: Record) -> None:
        """Append a record; it survives the end of this process."""
        if not processes.is_first():
            return
        try:
            with self.file.open("ab") as stream:
                stream.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self.file}: a record could not be written ({error}). Free some space or allow writing, and run the "
                "same command again: it resumes from the newest checkpoint"
            ) from error
        self._beside(record)

    def sync(self) -> tuple[int, str]:
        """Flush the file to disk, to survive a crash of the machine; return its size in bytes and its digest."""
        if not processes.is_first():
            return 0, ""
        with self.file.open("ab") as stream:
            os.fsync(stream.fileno())
        content = self.file.read_bytes()
        return len(content), _digest(content)

    def read(self) -> list[Record]:
        """All records, including those of earlier processes of the run; none in processes other than the first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if processes.is_first() else []


def read_records(file: Path) -> tuple[list[Record], dict[int, bytes]]:
    """The readable records, and the unreadable lines by number.

    An unreadable, unterminated last line is skipped: a process was killed while writing it.
    """
    *lines, torn = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    found = [parse_record(line) for line in lines]
    faulty = {i: line for i, (line, record) in enumerate(zip(lines, found, strict=True), 1) if record is None}
    return [record for record in (*found, parse_record(torn)) if record is not None], faulty


def parse_record(line: bytes) -> Record | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "phase" in record and isinstance(record.get("step"), int) else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
