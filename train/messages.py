"""Shared phrases of error messages."""

from __future__ import annotations

from collections.abc import Sequence

from jlora.messages import bullets


def listed(items: Sequence[str], most: int) -> str:
    """The first ``most`` items and the number of the others: ``a, b and 3 more``."""
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def bulleted(items: Sequence[str], most: int) -> str:
    """The first ``most`` items and the number of the others, each on its own line."""
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return bullets([*items[:most], *more])
