"""What a run tells of itself while it trains: ``metrics.jsonl``, and what else was asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.compute import processes

Record = dict[str, Any]


class Records:
    """A file of records, one JSON object a line, written by the first process alone; ``beside`` gets new ones too."""

    def __init__(self, file: Path, beside: Callable[[Record], None] = lambda _: None):
        self.file, self._beside = file, beside

    def cut(self, size: int, digest: str = "") -> None:
        """Go on after the first ``size`` bytes of the file, and drop the rest.

        Where these are not what `sync` told of them, it is said, and the records that can be read are kept.
        """
        if not processes.is_first():
            return
        there = self.file.read_bytes() if self.file.is_file() else b""
        kept = there[:size]
        if size and _digest(kept) != digest:
            kept = b"".join(line for line in kept.splitlines(keepends=True) if _is_record(line))
            print(
                f"{self.file} is not as the checkpoint left it: of {size:,} bytes, {len(kept):,} of whole records are "
                "kept, and the others are lost"
            )
        draft = self.file.with_name(self.file.name + ".draft")
        draft.write_bytes(kept)
        os.replace(draft, self.file)

    def write(self, record: Record) -> None:
        """Append a record, which survives this process from now on."""
        if not processes.is_first():
            return
        try:
            with self.file.open("ab") as stream:
                stream.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self.file}: a record could not be written ({error}). Make room or give the right to write, and run "
                "the same command again: it goes on from the newest checkpoint"
            ) from error
        self._beside(record)

    def sync(self) -> tuple[int, str]:
        """The size of the file in bytes and their digest; all is on disk, so that it survives the machine too."""
        if not processes.is_first():
            return 0, ""
        with self.file.open("ab") as stream:
            os.fsync(stream.fileno())
        content = self.file.read_bytes()
        return len(content), _digest(content)

    def read(self) -> list[Record]:
        """All records, those of earlier processes of the run too; none in other processes than the first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if processes.is_first() else []


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
