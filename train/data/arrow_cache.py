"""Files in, one memory-mapped dataset out. The cache is keyed by content, never by name or time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from jlora.files.json_files import read_json
from train.config import ConfigError
from train.data.cache_folder import filled
from train.data.formats import read_tables
from train.data.lines import File
from train.messages import listed

READERS = 1
"""The version of `train.data.formats`: another version's files are converted again."""


def cached_rows(
    files: Sequence[File], cache_dir: Path, quoted_tsv: bool, features: datasets.Features | None = None
) -> tuple[datasets.Dataset, dict[str, int], str]:
    """``(rows, rows of each file by name, digest)``; see `train.data.formats.read_tables`.

    The digest is the SHA-256 of the file; for several files, of their digests.
    """
    digests = [path_digest(file.path) for file in files]
    key = [READERS, quoted_tsv, str(features), [file.suffix for file in files], digests]
    folder = cache_dir / "data" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    filled(folder, lambda draft: _convert(files, draft, quoted_tsv, features))
    counts = read_json(folder / "rows.json")["rows"]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    names = [file.name for file in files]
    return datasets.Dataset.from_file(str(folder / "rows.arrow")), dict(zip(names, counts, strict=True)), digest


def path_digest(path: Path) -> str:
    """The SHA-256 of a file; for a folder, of its files' names and digests."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = "".join(f"{path_digest(file)}  {file.relative_to(path)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def rows_digest(rows: datasets.Dataset) -> str:
    """The SHA-256 of the rows' values, however they are chunked in memory and on disk."""
    digest = hashlib.sha256()
    batches: Any = rows.with_format("arrow").iter(1000)
    for batch in batches:
        sink = pa.BufferOutputStream()
        # Copied, so that a slice of a larger array has the bytes of a separate array.
        whole = batch.take(list(range(len(batch)))).combine_chunks().replace_schema_metadata()
        with pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _convert(files: Sequence[File], draft: Path, quoted_tsv: bool, features: datasets.Features | None) -> None:
    """Write the rows of files as one Arrow file."""
    counts = [0] * len(files)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(pa.OSFile(str(draft / "rows.arrow"), "wb"))
        writer = None
        for number, table in read_tables(files, quoted_tsv=quoted_tsv, features=features):
            writer = writer or stack.enter_context(pa.ipc.new_stream(sink, table.schema))
            writer.write_table(table)
            counts[number] += len(table)
        if writer is None:
            stack.enter_context(pa.ipc.new_stream(sink, pa.schema([])))
    if not sum(counts):
        names = listed([file.name for file in files], 4)
        raise ConfigError(f"{names} {'is' if len(files) == 1 else 'are'} empty: no rows")
    (draft / "rows.json").write_text(json.dumps({"rows": counts}))
