"""The name of a source (a file, a folder, a dataset on the hub) in, its rows and their provenance out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from jlora.files.buckets import download, fingerprint, is_in_bucket, located
from jlora.messages import nearest
from train.config import ConfigError
from train.data.arrow_cache import cached_rows, path_digest, rows_digest
from train.data.lines import File
from train.messages import listed

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
VALIDATION = ("validation", "dev", "valid", "val", "test")
"""Names of validation splits and files, in order of preference."""


@dataclass
class Provenance:
    """The origin of a set of examples, and the use of every row.

    Attributes:
      source: the file, folder or dataset, configured or found.
      found: how it was found; None if it was configured.
      files: the files read, with the rows of each; empty for a dataset read by `datasets`.
      split: the split of the source, or None.
      digest: SHA-256 of the file; of several files, of their digests; of a dataset on the hub, of its rows.
      read: number of rows read.
      dropped: number of unused rows, by reason.
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

    def describe(self) -> str:
        """A one-line description."""
        files = "" if [*self.files] in ([], [self.source]) else f" ({listed(list(self.files), 4)})"
        split = f", split {self.split}" if self.split else ""
        found = f", {self.found}" if self.found else ""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        used = f"{self.used:,} used; left out: {left_out}" if left_out else "all used"
        return f"{self.source}{files}{split}{found}: {self.read:,} rows read, {used}; sha256 {self.digest[:12]}"


def parse(source: str) -> tuple[str, str | None]:
    """``(location, split)`` of ``location:split``; the split is None without a colon."""
    source = os.path.expanduser(source)
    if Path(source).exists():
        return source, None
    location, colon, split = source.rpartition(":")
    return (location, split) if colon and location and "/" not in split else (source, None)


def source_digest(source: str) -> str | None:
    """The SHA-256 of a local file or folder; in a bucket, of names and versions; None for any other source."""
    location = parse(source)[0]
    if is_in_bucket(location):
        return fingerprint(location)
    path = Path(location)
    return path_digest(path) if path.exists() else None


def is_file(provenance: Provenance) -> bool:
    """Whether the source is a single file."""
    source = provenance.source
    return [*provenance.files] == [source] if is_in_bucket(source) else Path(source).is_file()


def find_validation(train: str) -> tuple[str, str]:
    """The validation source for a training source, and how it was found.

    Raises:
      ConfigError: if no file next to a training file has a name in `VALIDATION`.
    """
    location, _ = parse(train)
    path = located(location)
    if not path.is_file():
        return location, "the same source"
    first = File(path, path.name).suffix
    there = {one.name for one in path.parent.iterdir()}
    for name in VALIDATION:
        for suffix in (first, *SUFFIXES):
            sibling = path.with_name(name + suffix)
            if sibling.name in there and sibling != path and sibling.is_file():
                return str(sibling), f"found next to {path.name}"
    raise ConfigError(
        f"data.validation: got None, and no file next to {path} is named {', '.join(VALIDATION[:-1])} or "
        f"{VALIDATION[-1]}; pass --data.validation FILE, or --data.holdout 0.1 to hold out a tenth of the training "
        "examples"
    )


def read_source(
    source: str, cache_dir: Path, field: str, found: str | None, quoted_tsv: bool
) -> tuple[datasets.Dataset, Provenance]:
    """All rows of a source's split. A file is read completely; its split is selected later, by a column.

    Args:
      field: the configuration's field with the source, for errors. Without a split, ``data.train`` reads the split
        ``train``, and other fields the first one in `VALIDATION`.

    Raises:
      ConfigError: if the source does not exist, cannot be read, or is empty.
    """
    location, split = parse(source)
    path = Path(location)
    try:
        if is_in_bucket(location):
            path = download(located(location), cache_dir / "buckets")
        if path.is_file():
            file = File(path, location if is_in_bucket(location) else str(path))
            if file.suffix not in SUFFIXES:
                raise ConfigError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
            rows, files, digest = cached_rows([file], cache_dir, quoted_tsv)
        elif path.is_dir() or not (path.suffix in SUFFIXES or location.startswith((".", "/"))):
            wanted = (split,) if split else ("train",) if field == "data.train" else VALIDATION
            rows, files, digest, split = _read_dataset(str(path), wanted, cache_dir, quoted_tsv)
            files = {name.replace(str(path), location, 1): count for name, count in files.items()}
        else:
            siblings = sorted(str(file) for file in path.parent.glob("*") if file.suffix in SUFFIXES)
            missing = next((one for one in reversed(path.parents) if not one.is_dir()), None)
            why = nearest(location, siblings) if missing is None else f": there is no folder {missing}"
            raise ConfigError(f"no file at {location}{why}")
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    except Exception as error:  # readers raise any error for a malformed file; datasets has no common class
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{field}: {source} cannot be read: {reason[0]} Expected a file ({', '.join(SUFFIXES)}), a folder of such "
            "files, or a dataset on the hub as owner/name:split"
        ) from error
    if not len(rows):
        raise ConfigError(f"{field}: {source} has no examples")
    return rows, Provenance(location, found, files, split, digest, len(rows))


def _read_dataset(
    location: str, splits: Sequence[str], cache_dir: Path, quoted_tsv: bool
) -> tuple[datasets.Dataset, dict[str, int], str, str]:
    """``(rows, rows of each file, digest, split)`` of a folder or a dataset on the hub, for its first matching split.

    Files in one of `SUFFIXES` are read here. Others, such as images, are read by `datasets`, whose cache is keyed
    by names and times; so each content of a folder gets its own cache.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs errors before raising them
    local, cache = Path(location).is_dir(), cache_dir / "datasets"
    if local:
        digest = path_digest(Path(location))
        name, configuration, cache = location, None, cache / digest[:24]
    else:
        owner, name, *rest = location.split("/", 2)
        name, configuration, digest = f"{owner}/{name}", rest[0] if rest else None, ""
    builder = datasets.load_dataset_builder(name, configuration, cache_dir=str(cache))
    urls: Mapping[str, Sequence[str]] = {str(one): names for one, names in (builder.config.data_files or {}).items()}
    # Parquet on the hub is left to `datasets`: its types are declared in the file.
    if urls and builder.name in (("csv", "json", "text", "parquet") if local else ("csv", "json", "text")):
        split = _first_split(splits, list(urls))
        paths = urls[split] if local else _download(urls[split], cache)
        files = [File(Path(path), url) for path, url in zip(paths, urls[split], strict=True)]
        return *cached_rows(files, cache_dir, quoted_tsv, builder.info.features), split
    found = datasets.load_dataset(name, configuration, cache_dir=str(cache))
    assert isinstance(found, datasets.DatasetDict)
    split = _first_split(splits, [str(one) for one in found])
    return found[split], {}, digest or rows_digest(found[split]), split


def _first_split(wanted: Sequence[str], splits: Sequence[str]) -> str:
    for name in wanted:
        if name in splits:
            return name
    raise ConfigError(f"no split {' or '.join(wanted)}; expected one of {', '.join(splits)}")


def _download(urls: Sequence[str], cache: Path) -> list[str]:
    config = datasets.DownloadConfig(cache_dir=str(cache / "downloads"))
    return datasets.DownloadManager(download_config=config).download(list(urls))
