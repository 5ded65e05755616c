"""Damage: one file of a folder changed in one random place, determined by the seed.

A flipped bit, a cut, inserted bytes; a file that is missing, empty, a directory or another folder's; and in JSON a
value of another type, an extreme number, a value that is nested, missing or there twice.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**40, 2**63, 10**30, 0.0, -0.5, 1.5, 1e-300, 1e308, float("inf"),
    float("nan"), "", "x", "0", "null", "\0", "é" * 300, [], [0], [None], [[]], ["x", 1], {}, {"x": 1}, {"kind": "x"},
    [1e308] * 3, -(10**400),
)  # fmt: skip
"""Values that are invalid for most attributes, and some that are valid."""


class Damage(NamedTuple):
    """A damage that was done.

    Attributes:
      file: its name in the folder.
      how: in words.
      key: of JSON, the keys that lead to the place.
    """

    file: str
    how: str
    key: tuple[Any, ...] = ()


def damage(folder: Path, other: Path, rng: random.Random) -> Damage:
    """Change one file of ``folder``; ``other`` is a whole folder of the same kind."""
    # By size, as orbax gives its files new names each time.
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.suffix, f.stat().st_size, f.name))
    # Few files are JSON, but there is much to get wrong in them.
    texts = [file for file in files if _json(file) is not None]
    if texts and rng.random() < 0.5:
        file = rng.choice(texts)
        return _in_json(file, file.relative_to(folder), rng)
    file = rng.choice(files)
    how = rng.choice(WAYS)
    twin = other / file.relative_to(folder)
    said = how(file, twin if twin.is_file() else rng.choice(sorted(f for f in other.rglob("*") if f.is_file())), rng)
    return Damage(str(file.relative_to(folder)), said)


# Bytes


def _flip(file: Path, _: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        return "untouched: it is empty"
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"a bit of byte {place}"


def _cut(file: Path, _: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    place = rng.randrange(len(content) + 1)
    file.write_bytes(content[:place])
    return f"cut at byte {place}"


def _insert(file: Path, _: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    place = rng.randrange(len(content) + 1)
    file.write_bytes(content[:place] + rng.randbytes(rng.choice((1, 3, 64))) + content[place:])
    return f"bytes put in at {place}"


def _zero(file: Path, _: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content) + 1)
    content[place : place + 32] = bytes(len(content[place : place + 32]))
    file.write_bytes(content)
    return f"zeros from byte {place}"


def _missing(file: Path, _: Path, rng: random.Random) -> str:
    file.unlink()
    return "missing"


def _empty(file: Path, _: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "empty"


def _directory(file: Path, _: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a directory"


def _swap(file: Path, other: Path, rng: random.Random) -> str:
    shutil.copyfile(other, file)
    return "another folder's"


WAYS: tuple[Callable[[Path, Path, random.Random], str], ...] = (
    _flip, _flip, _flip, _cut, _insert, _zero, _missing, _empty, _directory, _swap,
)  # fmt: skip


# JSON


def _json(file: Path) -> Any:
    if file.suffix not in (".json", "") or file.stat().st_size > 10**6:
        return None
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _in_json(file: Path, name: Path, rng: random.Random) -> Damage:
    whole = _json(file)
    places = list(_places(whole))
    if not places:
        file.write_text(json.dumps(rng.choice(STRANGE)))
        return Damage(str(name), "replaced")
    where = rng.choice(places)
    above = whole
    for key in where[:-1]:
        above = above[key]
    last, value = where[-1], rng.choice(STRANGE)
    how = rng.choice(("value", "value", "value", "value", "nested", "missing", "twice", "renamed", "whole"))
    text = None
    if how == "nested":
        above[last] = rng.choice(([above[last]], {"x": above[last]}))
    elif how == "missing" or how == "renamed" and isinstance(above, list):
        del above[last]
    elif how == "renamed":
        above[f"{last}x"] = above.pop(last)
    elif how == "twice" and isinstance(above, dict):
        above["@twice@"] = value
        text = json.dumps(whole).replace('"@twice@"', json.dumps(last))
    elif how == "whole":
        whole, where = value, ()
    else:
        above[last] = value
        how = f"= {value!r:.40}"
    file.write_text(json.dumps(whole) if text is None else text)
    return Damage(str(name), how, where)


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*above, key)
        yield from _places(one, (*above, key))
