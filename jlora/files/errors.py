"""The error that all readers of files raise, and how it lists what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from jlora.messages import bullets

MAX_LISTED = 40


class TensorError(ValueError):
    """A file that cannot be used; the message names the file, any tensor in question, and what to do."""


def first_bullets(lines: Sequence[str]) -> str:
    """The first `MAX_LISTED` lines as bullets, and how many more there are."""
    more = len(lines) - MAX_LISTED
    return bullets(lines[:MAX_LISTED]) + (f"\n  - and {more} more" if more > 0 else "")
