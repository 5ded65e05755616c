"""Folders of a cache: each is complete or absent, checked when it is opened, and written again if it is damaged."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock

from jlora.files.checksums import check_sums, write_sums
from jlora.files.errors import TensorError


def filled(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill ``folder`` by ``write(draft)``, unless it is there and intact.

    One process writes, and others that share the cache wait for it and use what it wrote. Where processes have a cache
    each, each writes its own.
    """
    if _is_intact(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if _is_intact(folder):
            return
        for left in folder.parent.glob(f"{folder.name}.draft-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.draft-"))
        try:
            write(draft)
            write_sums(draft)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    try:
        check_sums(folder)
    except TensorError:  # missing or damaged
        return False
    return True
