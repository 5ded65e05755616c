"""The records of a run: ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from jlora.files.buckets import is_in_bucket
from jlora.files.drafts import drafts
from train.compute import processes

Record = dict[str, Any]
"""``phase``, ``step`` (of the phase, from 1) and its metrics; at the end of an epoch also ``epoch``."""


UPLOAD_SECONDS = 15.0
"""The time between two uploads of the records of a run in a bucket, which accepts one a second."""


def open_records(file: Path) -> Records:
    """The records in a file, local or in a bucket."""
    return BucketRecords(file) if is_in_bucket(file) else Records(file)


class Records:
    """A file of records, written by the first process only."""

    def __init__(self, file: Path):
        self.file = file

    def cut(self, size: int, digest: str = "") -> None:
        """Keep the first ``size`` bytes of the file, and drop the rest.

        If their digest differs from the one returned by `sync`, prints that and keeps the readable records.
        """
        if not processes.is_first():
            return
        kept = (self.file.read_bytes() if self.file.is_file() else b"")[:size]
        if size and _digest(kept) != digest:
            kept = b"".join(
                line for line in kept.splitlines(keepends=True) if line.endswith(b"\n") and parse_record(line)
            )
            print(
                f"{self.file} has changed since the checkpoint: of {size:,} bytes, {len(kept):,} of whole records are "
                "kept, the others are lost"
            )
        self._replace(kept)

    def write(self, record: Record) -> None:
        """Append a record. It survives the end of this process, in a bucket once it is uploaded."""
        if not processes.is_first():
            return
        try:
            self._append((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self.file}: a record could not be written ({error}). Free some space or allow writing, and run the "
                "same command again: it resumes from the newest checkpoint"
            ) from error

    def sync(self) -> tuple[int, str]:
        """Flush the file to disk, to survive a crash of the machine; return its size in bytes and its digest."""
        if not processes.is_first():
            return 0, ""
        content = self._flushed()
        return len(content), _digest(content)

    def read(self) -> list[Record]:
        """All records, including those of earlier processes of the run; none in processes other than the first."""
        return [json.loads(line) for line in self._flushed().splitlines()] if processes.is_first() else []

    def close(self) -> None:
        """Store what is not stored yet, where that is possible."""

    def _replace(self, content: bytes) -> None:
        with drafts(self.file) as (draft,):
            draft.write_bytes(content)

    def _append(self, line: bytes) -> None:
        with self.file.open("ab") as stream:
            stream.write(line)

    def _flushed(self) -> bytes:
        """The content, once all of it is on disk."""
        with self.file.open("ab") as stream:
            os.fsync(stream.fileno())
        return self.file.read_bytes()


class BucketRecords(Records):
    """Records in a bucket, which has no append: the file is uploaded again, at times and with each checkpoint.

    A killed process loses the records after its last upload. They come after its newest checkpoint, where the run
    resumes.
    """

    def __init__(self, file: Path):
        super().__init__(file)
        self._content, self._uploaded, self._uploaded_at = b"", True, time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the error that ended the training is raised
            self._flushed()

    def _replace(self, content: bytes) -> None:
        super()._replace(content)
        self._content, self._uploaded, self._uploaded_at = content, True, time.monotonic()

    def _append(self, line: bytes) -> None:
        self._content, self._uploaded = self._content + line, False
        if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self._flushed()

    def _flushed(self) -> bytes:
        if not self._uploaded:
            self._replace(self._content)
        return self._content


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
