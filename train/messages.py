"""Phrases that error messages share."""

from __future__ import annotations

from collections.abc import Sequence


def listed(items: Sequence[str], most: int) -> str:
    """The first ``most`` items and the number of the others: ``a, b and 3 more``."""
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")
