"""Sources: which files a name stands for, what they hold (as Arrow files, by content), and what is told of them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from jlora.files.checksums import check_sums, write_sums
from jlora.files.errors import TensorError
from jlora.files.json_files import read_json
from jlora.messages import nearest
from train.config import ConfigError
from train.data.formats import File, read_tables

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
VALIDATION = ("validation", "dev", "valid", "val", "test")
"""What the examples that are not trained on are called, by preference."""

READERS = 1
"""The version of `train.data.formats`: what other versions have read is read again."""


@dataclass
class Provenance:
    """What is told of a set of examples.

    Attributes:
      source: as it was asked for, or found.
      found: how, if it was not asked for.
      files: that were read, and how many rows each has; none for a dataset of the hub.
      split: of the source.
      digest: SHA-256 of the file; of several, that of their digests; of a dataset of the hub, that of its rows.
      read: how many rows there are.
      dropped: how many of them are not used, by the reason.
    """

    source: str
    found: str | None
    files: dict[str, int]
    split: str | None
    digest: str
    read: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.read - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "used": self.used}

    def line(self) -> str:
        """The same for a person."""
        files = "" if [*self.files] in ([], [self.source]) else f" ({_some(list(self.files))})"
        split = f", split {self.split}" if self.split else ""
        found = f", {self.found}" if self.found else ""
        left = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items())
        used = f"{self.used:,} used; left out: {left}" if left else "all used"
        return f"{self.source}{files}{split}{found}: {self.read:,} rows read, {used}; sha256 {self.digest[:12]}"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def parse(source: str) -> tuple[str, str | None]:
    """Location and split."""
    source = os.path.expanduser(source)
    if Path(source).exists():
        return source, None
    location, colon, split = source.rpartition(":")
    return (location, split) if colon and location and "/" not in split else (source, None)


def content(source: str) -> str | None:
    """The digest of a local source's files; None for what lies elsewhere."""
    path = Path(parse(source)[0])
    return _digest(path) if path.exists() else None


def beside(train: str) -> tuple[str, str]:
    """The source of the validation examples that goes with one of training examples, and how it was found."""
    location, _ = parse(train)
    path = Path(location)
    if not path.is_file():
        return location, "the same source"
    first = File(path, path.name).suffix
    for name in VALIDATION:
        for suffix in (first, *SUFFIXES):
            if (sibling := path.with_name(name + suffix)).is_file() and sibling != path:
                return str(sibling), f"found beside {path.name}"
    raise ConfigError(
        f"data.validation: got None, and beside {path} there is no file named {', '.join(VALIDATION[:-1])} or "
        f"{VALIDATION[-1]}; pass --data.validation FILE, or --data.holdout 0.1 "
        "to set a tenth of the training examples apart"
    )


def read_source(
    source: str, cache_dir: Path, of: str, found: str | None, quoted_tsv: bool
) -> tuple[datasets.Dataset, Provenance]:
    """All rows of a source's split, and what is told of them; a file has one split, which is asked for by a column.

    Args:
      of: the field of the configuration that names the source, for errors; that of the training examples asks for the
        split ``train``, others for the first of `VALIDATION`.

    Raises:
      ConfigError: if the source is not there, cannot be read, or is empty.
    """
    location, split = parse(source)
    path = Path(location)
    try:
        if path.is_file():
            files = [File(path, str(path))]
            if files[0].suffix not in SUFFIXES:
                raise ConfigError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
            rows, provenance = _from_files(files, cache_dir, quoted_tsv)
        elif path.is_dir() or not (path.suffix in SUFFIXES or location.startswith((".", "/"))):
            rows, provenance = _from_dataset(location, split, cache_dir, of, quoted_tsv)
        else:
            siblings = sorted(str(file) for file in path.parent.glob("*") if file.suffix in SUFFIXES)
            raise ConfigError(f"there is no file at {location}{nearest(location, siblings)}")
    except ConfigError as error:
        raise ConfigError(f"{of}: {error}") from error
    except Exception as error:  # whatever a reader raises of a malformed file: datasets has no common class for it
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{of}: {source} cannot be read: {reason[0]} Expected a file ({', '.join(SUFFIXES)}), a folder of such, "
            "or a dataset on the hub as owner/name:split"
        ) from error
    if not len(rows):
        raise ConfigError(f"{of}: {source} has no examples")
    return rows, dataclasses.replace(provenance, source=location, found=found, split=split or provenance.split)


# Files that are read here


def _from_files(
    files: Sequence[File], cache_dir: Path, quoted_tsv: bool, features: datasets.Features | None = None
) -> tuple[datasets.Dataset, Provenance]:
    digests = [_digest(file.path) for file in files]
    made_of = [READERS, quoted_tsv, str(features), [file.suffix for file in files], digests]
    folder = cache_dir / "data" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    if not _is_whole(folder):
        _convert(files, folder, quoted_tsv, features)
    counts = read_json(folder / "rows.json")["rows"]
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    names = [file.name for file in files]
    return rows, Provenance("", None, dict(zip(names, counts, strict=True)), None, digest, len(rows))


def _is_whole(folder: Path) -> bool:
    try:
        check_sums(folder)
    except TensorError:  # not there, or damaged: then it is written again
        return False
    return True


def _convert(files: Sequence[File], folder: Path, quoted_tsv: bool, features: datasets.Features | None) -> None:
    """Write the rows of files as one Arrow file; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix="draft-"))
    counts = [0] * len(files)
    try:
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
            names = _some([file.name for file in files])
            raise ConfigError(f"{names} {'is' if len(files) == 1 else 'are'} empty: there are no rows")
        (draft / "rows.json").write_text(json.dumps({"rows": counts}))
        write_sums(draft)
        try:
            draft.rename(folder)
        except (
            OSError
        ):  # Another run converted the same files meanwhile, and what it wrote is as good, or it is damaged.
            if not _is_whole(folder):
                shutil.rmtree(folder)
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _digest(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of the names and the digests of its files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = "".join(f"{_digest(file)}  {file.relative_to(path)}\n" for file in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Folders and the hub, whose files `datasets` finds


def _from_dataset(
    location: str, split: str | None, cache_dir: Path, of: str, quoted_tsv: bool
) -> tuple[datasets.Dataset, Provenance]:
    """A split of a folder, or of a dataset on the hub.

    Files of `SUFFIXES` in it are read here. Others, such as pictures, are read by `datasets`: its cache goes by names
    and times, so each content has one of its own.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    local = Path(location).is_dir()
    kept = cache_dir / "datasets"
    if local:
        digest = _digest(Path(location))
        name, configuration, kept = location, None, kept / digest[:24]
    else:
        owner, name, *rest = location.split("/", 2)
        name, configuration, digest = f"{owner}/{name}", rest[0] if rest else None, ""
    builder = datasets.load_dataset_builder(name, configuration, cache_dir=str(kept))
    files: Mapping[str, Sequence[str]] = {str(one): urls for one, urls in (builder.config.data_files or {}).items()}
    own = {one: [File(Path(url), url) for url in urls] for one, urls in files.items()}
    # Parquet of the hub has declared types, whoever reads it.
    if own and builder.name in (("csv", "json", "text", "parquet") if local else ("csv", "json", "text")):
        chosen = _split(list(own), split, of)
        here = own[chosen] if local else _fetched(own[chosen], kept)
        rows, provenance = _from_files(here, cache_dir, quoted_tsv, builder.info.features)
        return rows, dataclasses.replace(provenance, split=chosen)
    found = datasets.load_dataset(name, configuration, cache_dir=str(kept))
    assert isinstance(found, datasets.DatasetDict)
    chosen = _split([str(one) for one in found], split, of)
    rows = found[chosen]
    return rows, Provenance("", None, {}, chosen, digest or _digest_of_rows(rows), len(rows))


def _split(there: Sequence[str], split: str | None, of: str) -> str:
    # A source without a split means the training examples, or for validation the first of the usual names.
    wanted = (split,) if split else ("train",) if of == "data.train" else VALIDATION
    for name in wanted:
        if name in there:
            return name
    raise ConfigError(f"there is no split {' or '.join(wanted)}; there are {', '.join(there)}")


def _fetched(files: Sequence[File], kept: Path) -> list[File]:
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(cache_dir=str(kept / "downloads")))
    paths = manager.download([file.name for file in files])
    return [File(Path(path), file.name) for path, file in zip(paths, files, strict=True)]


def _digest_of_rows(rows: datasets.Dataset) -> str:
    """A digest of what rows hold, however they are divided in memory and on the disk."""
    digest = hashlib.sha256()
    batches: Any = rows.with_format("arrow").iter(1000)
    for batch in batches:
        sink = pa.BufferOutputStream()
        # Copied, so that a part of a larger array has the bytes of one that holds no more.
        whole = batch.take(list(range(len(batch)))).combine_chunks().replace_schema_metadata()
        with pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
        digest.update(sink.getvalue())
    return digest.hexdigest()
