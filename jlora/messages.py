"""Text for errors and terminals: bulleted lists, close matches, short values, aligned tables.

An error in jlora states what it got, what it expected and how to fix it, and lists every problem at once:

>>> raise ValueError(f"3 fields are out of range:{bullets(problems)}")
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

__all__ = ["bullets", "nearest", "one_line", "shown", "table"]


def bullets(lines: Iterable[str]) -> str:
    """The lines as a bulleted list, for the end of an error's first line."""
    return "".join(f"\n  - {line}" for line in lines)


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """``" (closest: 'query', 'key')"``: up to ``n`` of ``names`` that resemble ``name``, or ``""`` if none does.

    A path is as close to a name as its closest component.
    """

    def closeness(path: str) -> float:
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (path, *path.split("/")))

    close = sorted(((closeness(p), p) for p in names), key=lambda pair: -pair[0])[:n]
    return f" (closest: {', '.join(repr(p) for ratio, p in close)})" if close and close[0][0] > 0.5 else ""


def shown(value: Any) -> str:
    """The repr of a value in one line, cut to 120 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a number of thousands of digits"
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= 120 else f"{text[:117]}..."


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, cut to 300 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Aligned columns under a header and a line; the columns numbered in ``right`` are right-aligned."""
    body = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in [tuple(header), *body]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, body)])
