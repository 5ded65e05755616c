"""The error raised by all readers of files."""

from __future__ import annotations

from collections.abc import Sequence

from jlora.messages import bullets

MAX_LISTED = 40


class TensorError(ValueError):
    """A file that cannot be used; the message names the file, the tensor if any, and the remedy."""


def first_bullets(lines: Sequence[str]) -> str:
    """The first `MAX_LISTED` lines as bullets, and the number of others."""
    more = len(lines) - MAX_LISTED
    return bullets(lines[:MAX_LISTED]) + (f"\n  - and {more} more" if more > 0 else "")
