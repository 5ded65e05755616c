"""Files in Google Cloud Storage, by URLs such as ``gs://bucket/folder/file``, beside local ones.

A bucket has no rename and no append, and its folders are only parts of names. An upload replaces a whole object or
nothing, so a file is replaced by an upload (`jlora.files.drafts`), and a folder is complete once it has the file that
is written last, `SHA256SUMS` (`jlora.files.checksums`).

`located` returns `pathlib.Path` for local paths, and `etils.epath.Path` for URLs, which has the methods of
`pathlib.Path` used here. orbax accepts both.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

from jlora.files.errors import TensorError
from jlora.messages import one_line

_URL = re.compile(r"([a-z][a-z0-9]+):/+(.*)", re.DOTALL)
_BLOCK_BYTES = 32 * 2**20


def is_in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a ``gs://`` URL, also in pathlib's spelling, ``gs:/bucket``."""
    return os.fspath(path).startswith("gs:/")


def text(path: str | os.PathLike[str]) -> str:
    """``path`` as text; a URL has two slashes, of which pathlib drops one."""
    return re.sub("^gs:/+", "gs://", os.fspath(path))


def located(path: str | os.PathLike[str]) -> Path:
    """The path of a local file or folder, or of one in a bucket.

    Raises:
      TensorError: for a URL without a bucket, a bucket of another kind, or if gcsfs is not installed.
    """
    match = _URL.fullmatch(os.fspath(path))
    if match is None or match[1] not in ("gs", "s3", "az", "hf"):
        return Path(path)
    if match[1] != "gs" or not match[2].strip("/"):
        raise TensorError(f"{path}: expected a local path, or gs://BUCKET/NAME")
    if isinstance(path, PurePath) and not isinstance(path, Path):  # an epath.Path
        return cast(Path, path)
    _filesystem()  # before epath's own, so that both have its settings
    from etils import epath

    return cast(Path, epath.Path(text(path)))


def absolute(path: Path) -> Path:
    """``path.resolve()`` for a local path; a URL is absolute."""
    return path if is_in_bucket(path) else path.resolve()


def split(path: Path) -> tuple[str, str]:
    """The bucket of a URL, and the name in it."""
    bucket, _, name = text(path).removeprefix("gs://").partition("/")
    return bucket, name


def open_to_read(file: Path) -> Any:
    """``file`` opened to read all its bytes; from a bucket, in large blocks."""
    if not is_in_bucket(file):
        return file.open("rb")
    return _filesystem().open(text(file), "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


@contextlib.contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises the errors of the libraries beneath (refused credentials, a lost network) as `OSError`, with the path."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("aiohttp", "gcsfs", "google", "requests"):
            raise
        raise OSError(f"{text(path)}: {one_line(error)}") from error


def names_below(folder: Path) -> list[str]:
    """The names of all files below a folder in a bucket, sorted."""
    top = text(folder).removeprefix("gs://").rstrip("/") + "/"
    return sorted(name.removeprefix(top) for name in _filesystem().find(f"gs://{top}") if name.startswith(top))


def upload(file: Path, target: Path) -> None:
    """Upload a local file: ``target`` is replaced as a whole, or not at all. Raises an OSError if the bucket reports
    another content than was sent."""
    with errors_of(target):
        _filesystem().put_file(str(file), text(target), consistency="md5")


def upload_folder(folder: Path, target: Path, last: str = "") -> None:
    """Replace ``target`` by the files of a local folder; the one with the name ``last``, if any, is uploaded last."""
    remove_folder(target, first=last)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: name == last):
        upload(folder / name, target / name)


def remove_folder(folder: Path, first: str = "") -> None:
    """Delete all files below a folder in a bucket, if there are any, and the one with the name ``first`` before."""
    there: Any = folder
    if first:
        (there / first).unlink(missing_ok=True)
    there.rmtree(missing_ok=True)


def fingerprint(url: str | os.PathLike[str]) -> str:
    """A digest of the names and generations of all files at a URL, which changes with any of them.

    Raises:
      FileNotFoundError: if there are none.
    """
    return _digest(_entries(url))


def download(url: str | os.PathLike[str], cache: Path | None = None, files: Sequence[str] = ("*",)) -> Path:
    """The local copy of a file or folder in a bucket. A file is downloaded once for each content.

    Args:
      cache: the folder of all copies; by default ``buckets`` in the cache of jlora, ``~/.cache/jlora``, or its place
        under ``XDG_CACHE_HOME``.
      files: patterns of the files of a folder to download; others may be missing from the copy.

    Raises:
      FileNotFoundError: if there is no file at ``url``.
      OSError: if a download fails.
    """
    entries = _entries(url)
    copy = (cache or default_cache() / "buckets") / _digest(entries)[:24] / text(url).rstrip("/").rpartition("/")[2]
    for name, entry in entries.items():
        target = copy / name if name else copy
        if name and not any(fnmatch.fnmatch(name, pattern) for pattern in files) or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{secrets.token_hex(4)}.draft")
        try:
            with errors_of(url):
                _filesystem().get_file(entry["name"], str(draft))
            if draft.stat().st_size != int(entry["size"]):
                raise OSError(f"gs://{entry['name']}: got {draft.stat().st_size:,} of {int(entry['size']):,} bytes")
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    return copy


def default_cache() -> Path:
    """``~/.cache/jlora``, or its place under ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"


def _entries(url: str | os.PathLike[str]) -> dict[str, Mapping[str, Any]]:
    """The metadata of the files at a URL by their names below it; "" is the name of a file at the URL itself."""
    top = text(url).removeprefix("gs://").rstrip("/")
    with errors_of(url):
        found = _filesystem().find(f"gs://{top}", detail=True)
    files = {name.removeprefix(top).lstrip("/"): one for name, one in sorted(found.items()) if one["type"] == "file"}
    if not files:
        raise FileNotFoundError(f"there are no files at gs://{top}")
    return {"": files[""]} if "" in files else files


def _digest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{one['name']} {one['generation']}\n" for one in entries.values())
    return hashlib.sha256(lines.encode()).hexdigest()


@functools.cache
def _filesystem() -> Any:
    """The file system of all buckets.

    Raises:
      TensorError: if gcsfs is not installed.
    """
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath prefers TensorFlow's file system, if it is installed
    try:
        import fsspec.config
        import gcsfs  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TensorError(f"gs:// needs the package gcsfs ({error}). Run: pip install 'jlora[gcs]'") from error
    # A list of names, kept by this process, would lack what orbax and other processes write.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")
