"""Token counts of texts in, a summary of the truncation by ``max_length`` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Truncation(NamedTuple):
    """The cost of truncating a set of texts to ``limit`` tokens.

    Attributes:
      limit: maximum tokens per example.
      examples: number of examples before truncation.
      longest: tokens of the longest example.
      cut: examples longer than ``limit``.
      dropped: examples left out because no token with loss remains.
      tokens: tokens that carry loss, over all examples before truncation; for classification, all tokens.
      lost: the number of these that are cut.
      ends: examples whose last token carries loss and is cut, so their end is never trained; None for
        classification.
    """

    limit: int
    examples: int
    longest: int
    cut: int
    dropped: int
    tokens: int
    lost: int
    ends: int | None

    @classmethod
    def of(cls, limit: int, lengths: Sequence[int]) -> Truncation:
        """Texts to be classified, of ``lengths`` tokens, truncated to ``limit`` tokens."""
        over = [length - limit for length in lengths if length > limit]
        return cls(limit, len(lengths), max(lengths, default=0), len(over), 0, sum(lengths), sum(over), None)

    def plus(self, other: Truncation) -> Truncation:
        """The truncation of both sets of texts, by the same limit."""
        both = (self, other)
        return Truncation(
            limit=self.limit,
            examples=sum(one.examples for one in both),
            longest=max(one.longest for one in both),
            cut=sum(one.cut for one in both),
            dropped=sum(one.dropped for one in both),
            tokens=sum(one.tokens for one in both),
            lost=sum(one.lost for one in both),
            ends=None if self.ends is None or other.ends is None else self.ends + other.ends,
        )

    def describe(self, name: str, *, training: bool = True) -> str:
        """One line about the set ``name``; in ``training``, with the flag that avoids truncation."""
        if not self.cut and not self.dropped:
            return f"{name}: {self.examples:,} examples of at most {self.longest:,} tokens, none is cut"
        parts = []
        if self.cut:
            what = "tokens" if self.ends is None else "tokens of loss"
            ends = f", and {self.ends:,} examples lose their end" if self.ends else ""
            parts.append(
                f"{self.cut:,} of {self.examples:,} examples are cut at {self.limit:,} tokens: {self.lost:,} of "
                f"{self.tokens:,} {what} are lost{ends}"
            )
        if self.dropped:
            parts.append(
                f"{self.dropped:,} of {self.examples:,} examples are left out: none of their tokens carries loss"
            )
        advice = f" (--task.max-length {self.longest} keeps all)" if self.cut and training else ""
        return f"{name}: {'; '.join(parts)}{advice}"
