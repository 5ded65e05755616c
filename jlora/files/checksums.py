"""SHA-256 checksums of a folder's files, stored next to them, so that damage is detected.

``SHA256SUMS`` has the format of ``sha256sum``, so that ``sha256sum -c SHA256SUMS`` checks a folder by hand. It is
written last: in a bucket, which has no rename, it marks the folder as complete.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from jlora.files.buckets import is_in_bucket, names_below, open_to_read
from jlora.files.drafts import drafts
from jlora.files.errors import TensorError
from jlora.messages import bullets

_A = TypeVar("_A")
_B = TypeVar("_B")

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")


def write_sums(folder: Path, files: Mapping[str, Path] | None = None) -> None:
    """Write the checksums of ``files``, by their names in ``folder``; by default of all files in it."""
    files = {name: file for name, file in files_in(folder).items() if name != SUMS} if files is None else files
    lines = [f"{digest}  {name}\n" for name, digest in zip(files, _map(folder, _sum, files.values()), strict=True)]
    with drafts(folder / SUMS) as (draft,):
        draft.write_text("".join(lines), encoding="utf-8")


def files_in(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their relative names, sorted."""
    if is_in_bucket(folder):
        return {name: folder / name for name in names_below(folder)}
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def check_sums(folder: Path) -> None:
    """Compare the files of a folder with their checksums.

    Raises:
      TensorError: listing every file that is missing or differs; or if there are no valid checksums.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TensorError(
            f"{folder / SUMS} cannot be read ({error}), so the files cannot be verified. {_AGAIN}"
        ) from error
    sums = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    faults = _map(folder, lambda name: _fault(folder / name, sums[name]), sums)
    wrong = [f"{name} {fault}" for name, fault in zip(sums, faults, strict=True) if fault]
    if len(sums) < len(lines) or not sums:
        wrong.append(f"{SUMS} has {len(lines)} lines, but only {len(sums)} valid checksums of different files")
    if wrong:
        raise TensorError(f"{folder} is damaged, or was changed since it was written:{bullets(wrong)}\n{_AGAIN}")


_AGAIN = (
    "Expected unchanged files: copy or save them again. If you changed them, update the checksums: "
    f"`find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}` in that folder."
)


def _map(folder: Path, function: Callable[[_A], _B], items: Iterable[_A]) -> list[_B]:
    """``function`` of each item; in a bucket several at once, because each waits for the network."""
    if not is_in_bucket(folder):
        return [function(item) for item in items]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, items))


def _fault(file: Path, expected: str) -> str | None:
    try:
        return None if _sum(file) == expected else "differs"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read ({error})"


def _sum(file: Path) -> str:
    with open_to_read(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
