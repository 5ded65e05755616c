"""JSON objects in files: read strictly, written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jlora.files.drafts import drafts
from jlora.files.errors import TensorError

MAX_BYTES = 100_000_000
"""The largest file to read; also safetensors' limit for headers."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      TensorError: if the file cannot be read, is larger than `MAX_BYTES`, is not JSON, or holds anything other than an
        object; or if an object in it has a key twice.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise TensorError(f"{file} has these keys twice: {twice}; expected each once, since readers may use either")
        return found

    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TensorError(f"{file} has more than {MAX_BYTES:,} bytes; expected at most that")
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except TensorError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
        raise TensorError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TensorError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(file: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write ``value`` as JSON; on an error ``file`` keeps its old content. The arguments are those of `json_text`."""
    with drafts(file) as (draft,):
        draft.write_text(json_text(value, sort_keys=sort_keys))


def json_text(value: Any, *, sort_keys: bool = True) -> str:
    """``value`` as the text of a JSON file.

    Args:
      value: as for `json.dumps`.
      sort_keys: sort the keys of objects, so that equal values give equal bytes.
    """
    return json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"
