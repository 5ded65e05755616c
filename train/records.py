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
    """A file of records, one JSON object a line. The first process alone writes it.

    Attributes:
      size: of the file in bytes.
    """

    def __init__(self, file: Path, size: int = 0, beside: Callable[[Record], None] = lambda _: None):
        """Go on with the first ``size`` bytes of ``file``, and drop the rest; ``beside`` gets every new record too."""
        self.file, self.size, self._beside = file, size, beside
        if not processes.is_first():
            return
        there = file.stat().st_size if file.exists() else 0
        if there < size:
            print(f"{file} has {there:,} bytes where the checkpoint knows of {size:,}: the records between are lost")
            self.size = there
        with file.open("ab") as stream:
            stream.truncate(self.size)

    def write(self, record: Record) -> None:
        """Append a record, which survives this process from now on."""
        if not processes.is_first():
            return
        line = (json.dumps(record) + "\n").encode()
        with self.file.open("ab") as stream:
            stream.write(line)
        self.size += len(line)
        self._beside(record)

    def sync(self) -> int:
        """The size of the file, of which all is on disk, so that it survives the machine too."""
        if processes.is_first():
            with self.file.open("rb") as stream:
                os.fsync(stream.fileno())
        return self.size

    def read(self) -> list[Record]:
        """All records, those of earlier processes of the run too; none in other processes than the first."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if processes.is_first() else []
