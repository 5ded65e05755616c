"""The records of a run: ``metrics.jsonl``, one JSON object a line."""

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
"""``phase``, ``step`` (of the phase, from 1) and the metrics logged there; at the end of an epoch also ``epoch``."""


class Records:
    """A file of records, written by the first process alone; each new one is passed on to ``beside`` too."""

    def __init__(self, file: Path, beside: Callable[[Record], None] = lambda _: None):
        self.file, self._beside = file, beside

    def cut(self, size: int, digest: str = "") -> None:
        """Keep the first ``size`` bytes of the file, and drop the rest.

        If these do not have the digest that `sync` returned, that is printed, and the readable records are kept.
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
                f"{self.file} is not as the checkpoint left it: of {size:,} bytes, {len(kept):,} of whole records are "
                "kept, and the others are lost"
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
        """Flush the file to disk, so that it survives a crash of the machine; return its size in bytes and digest."""
        if not processes.is_first():
            return 0, ""
        with self.file.open("ab") as stream:
            os.fsync(stream.fileno())
        content = self.file.read_bytes()
        return len(content), _digest(content)

    def read(self) -> list[Record]:
        """All records, also those of earlier processes of the run; none in processes other than the first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if processes.is_first() else []


def read_records(file: Path) -> tuple[list[Record], dict[int, bytes]]:
    """The records that can be read, and the lines that cannot, by their numbers.

    A last line without an end is left out if it cannot be read: a process was killed while it wrote it.
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
