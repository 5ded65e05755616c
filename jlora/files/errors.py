"""The errors of files, checkpoints and adapters, for a program to show to its user. They need no jax."""

from __future__ import annotations

from collections.abc import Sequence

from jlora.messages import bullets

MAX_LISTED = 40


class TensorError(ValueError):
    """A file that cannot be used; the message names the file, the tensor if any, and the remedy."""


class ModelError(ValueError):
    """A checkpoint or configuration that cannot be used; the message names the problem and the remedy."""


class PeftError(ValueError):
    """An adapter that PEFT or jlora cannot represent; the message lists every problem and its remedy."""


def first_bullets(lines: Sequence[str]) -> str:
    """The first `MAX_LISTED` lines as bullets, and the number of others."""
    more = len(lines) - MAX_LISTED
    return bullets(lines[:MAX_LISTED]) + (f"\n  - and {more} more" if more > 0 else "")
