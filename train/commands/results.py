"""Results of predict and generate in a file: one JSON line per input, in order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.config import ConfigError

_SEPARATORS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})
"""Characters that some programs treat as line ends."""


def check_new(out: Path | None) -> None:
    """Raises a ConfigError if a new file ``out`` cannot be written; called before computing results."""
    if out is None:
        return
    if out.suffix != ".jsonl":
        raise ConfigError(f"got --out {out}, expected a file whose name ends in .jsonl: one JSON line per input")
    if out.exists():
        raise ConfigError(f"{out} already exists; remove it, or pass --out with a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"got --out {out}, but there is no folder {out.parent}; create it, or pass another --out")


def write_results(out: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the records, all or none, and print the path."""
    texts = [json.dumps(record, ensure_ascii=False).translate(_SEPARATORS) for record in records]
    draft = out.with_name(f"{out.name}.draft")
    draft.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    os.replace(draft, out)
    print(f"written to {out}: {len(texts)} lines")
