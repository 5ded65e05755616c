"""Atomic replacement of files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jlora.files.buckets import is_in_bucket, upload


@contextlib.contextmanager
def drafts(*files: Path) -> Iterator[list[Path]]:
    """Local paths to write to, which replace ``files`` when the block ends; after an error, ``files`` are unchanged.

    Files in a bucket are replaced one after the other by uploads.

    >>> with drafts(folder / "notes.txt") as (draft,):
    ...     draft.write_text("all of it")
    """
    with contextlib.ExitStack() as stack:
        if any(map(is_in_bucket, files)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jlora-")))
            paths, replace = [folder / file.name for file in files], upload
        else:
            paths, replace = [file.with_name(file.name + ".draft") for file in files], os.replace
        try:
            yield paths
            for path, file in zip(paths, files, strict=True):
                replace(path, file)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
