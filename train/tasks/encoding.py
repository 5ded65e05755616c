"""Encoded examples, cached on disk and memory-mapped, so that neither texts nor tokens of all rows are in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jlora.files.json_files import read_json
from train.compute.processes import say
from train.data import ragged
from train.data.arrow_cache import path_digest
from train.data.cache_folder import filled
from train.data.ragged import Examples, Kind, Ragged, RaggedWriter
from train.data.tables import Table

CHUNK = 1000
"""Texts that are tokenized at once: their offsets take far more memory than the resulting tokens."""

ENCODERS = 1
"""The version of the tasks' encoders: examples of other versions are encoded again."""


class Draft:
    """Where a task writes its examples.

    Attributes:
      folder: for their files; None for memory.
      notes: what was said about them.
    """

    def __init__(self, folder: Path | None = None):
        self.folder, self.notes = folder, list[str]()

    def writer(self, kinds: Mapping[str, Kind]) -> RaggedWriter:
        return RaggedWriter(kinds, self.folder)

    def say(self, text: str) -> None:
        """Print in the first process only, now and whenever the examples are read from the cache."""
        self.notes.append(text)
        say(text)


def encoded(
    encode: Callable[[Table, Draft], Examples], table: Table, identity: Any, tokenizer: Any, cache_dir: Path
) -> Examples:
    """``encode(table, draft)``; if these rows were encoded before, from the cache: same examples, notes, dropped rows.

    Args:
      identity: what the examples depend on, besides the table and the tokenizer, as JSON.
    """
    if not table.content or table.provenance is None:
        return encode(table, Draft())
    key = json.dumps([ENCODERS, table.content, identity, tokenizer_digest(tokenizer)], default=str)
    folder = cache_dir / "examples" / hashlib.sha256(key.encode()).hexdigest()[:24]
    dropped = table.provenance.dropped
    before, here = dict(dropped), False

    def write(folder: Path) -> None:
        nonlocal here
        draft, here = Draft(folder), True
        examples = encode(table, draft)
        added = {why: count - before.get(why, 0) for why, count in dropped.items()}
        _save(folder, examples, {"notes": draft.notes, "dropped": added})

    filled(folder, write)
    about = read_json(folder / "examples.json")
    if not here:
        for note in about["notes"]:
            say(note)
        for why, count in about["dropped"].items():
            table.count_dropped(count, why)
    columns = {name: ragged.mapped(folder / name, dtype) for name, dtype in about["arrays"].items()}
    return {**ragged.load(folder, about["ragged"]), **columns}


def tokenizer_digest(tokenizer: Any) -> str:
    """The SHA-256 of all that determines what a tokenizer returns."""
    tokenizer("a")  # resets the truncation and padding of earlier calls, which fast tokenizers save
    sides = f"{tokenizer.padding_side} {tokenizer.truncation_side} {tokenizer.pad_token_id}"
    versions = [version(name) for name in ("transformers", "tokenizers")]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return hashlib.sha256(json.dumps([sides, versions, path_digest(Path(folder))]).encode()).hexdigest()


def _save(folder: Path, examples: Examples, about: Mapping[str, Any]) -> None:
    """Write the columns that are not ragged, and ``about``; the others are in the folder."""
    arrays = {name: column for name, column in examples.items() if not isinstance(column, Ragged)}
    for name, column in arrays.items():
        column.tofile(folder / name)
    described = {
        "ragged": ragged.describe({name: one for name, one in examples.items() if isinstance(one, Ragged)}),
        "arrays": {name: column.dtype.name for name, column in arrays.items()},
        **about,
    }
    (folder / "examples.json").write_text(json.dumps(described))
