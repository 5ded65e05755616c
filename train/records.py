"""What a run tells of itself while it trains: ``metrics.jsonl``, and what else was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import processes

Record = dict[str, Any]


class Records:
    """A file of records, one JSON object a line, written by the first process alone; ``beside`` gets new ones too."""

    def __init__(self, file: Path, beside: Callable[[Record], None] = lambda _: None):
        self.file, self._beside = file, beside

    def cut(self, size: int) -> None:
        """Go on after the first ``size`` bytes of the file, or the lines that are left of these, and drop the rest."""
        if not processes.is_first():
            return
        there = self.file.stat().st_size if self.file.exists() else 0
        if there < size:
            print(f"{self.file} has {there:,} bytes, the checkpoint knows of {size:,}: the records between are lost")
            size = self.file.read_bytes().rfind(b"\n") + 1 if there else 0
        with self.file.open("ab") as stream:
            stream.truncate(size)

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

    def sync(self) -> int:
        """The size of the file in bytes, of which all is on disk, so that it survives the machine too."""
        if not processes.is_first():
            return 0
        with self.file.open("ab") as stream:
            os.fsync(stream.fileno())
            return stream.tell()

    def read(self) -> list[Record]:
        """All records, those of earlier processes of the run too; none in other processes than the first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if processes.is_first() else []
