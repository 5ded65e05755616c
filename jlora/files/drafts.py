"""Atomic replacement of files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def drafts(*files: Path) -> Iterator[list[Path]]:
    """Paths to write to, which replace ``files`` when the block ends; after an error, ``files`` are unchanged.

    >>> with drafts(folder / "notes.txt") as (draft,):
    ...     draft.write_text("all of it")
    """
    paths = [file.with_name(file.name + ".draft") for file in files]
    try:
        yield paths
        for path, file in zip(paths, files, strict=True):
            os.replace(path, file)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
