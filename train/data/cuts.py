"""What `max_length` takes from a set of texts, counted and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """What was cut.

    Attributes:
      limit: tokens of an example, at most.
      examples: how many there were.
      longest: tokens of the longest one.
      cut: examples that were longer than ``limit``.
      dropped: examples that are left out, since no token to learn is left in them.
      tokens: over all examples, before anything was cut: tokens of loss; of a classifier's texts, all tokens.
      lost: how many of these are cut.
      ends: examples whose last token was to be learnt and is cut, so that where they end is not learnt; None for
        texts that are not continued.
    """

    limit: int
    examples: int
    longest: int
    cut: int
    dropped: int
    tokens: int
    lost: int
    ends: int | None


def cut_to(limit: int, lengths: Sequence[int]) -> Cut:
    """Texts of some lengths, in tokens, of which the first ``limit`` count."""
    over = [length - limit for length in lengths if length > limit]
    return Cut(limit, len(lengths), max(lengths, default=0), len(over), 0, sum(lengths), sum(over), None)


def line(name: str, cut: Cut, *, trains: bool = True) -> str:
    """One line about the set ``name``, for a person; where it ``trains``, with the flag that cuts none."""
    if not cut.cut and not cut.dropped:
        return f"{name}: {cut.examples:,} examples of at most {cut.longest:,} tokens, none is cut"
    parts = []
    if cut.cut:
        what = "tokens" if cut.ends is None else "tokens of loss"
        ends = f", and {cut.ends:,} examples their end" if cut.ends else ""
        parts.append(
            f"{cut.cut:,} of {cut.examples:,} examples are cut at {cut.limit:,} tokens: {cut.lost:,} of "
            f"{cut.tokens:,} {what} are lost{ends}"
        )
    if cut.dropped:
        parts.append(f"{cut.dropped:,} of {cut.examples:,} examples are left out, with no token to learn")
    advice = f" (--task.max-length {cut.longest} cuts none)" if cut.cut and trains else ""
    return f"{name}: {'; '.join(parts)}{advice}"
