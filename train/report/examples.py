"""Training examples as text: decoded, with the tokens that carry loss marked."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.ragged import Examples
from train.tasks.base import Task

SHORT = 300
"""The number of characters of the example that a run prints at its start."""


class Piece(NamedTuple):
    """Consecutive tokens, all with or all without loss."""

    text: str
    loss: bool


class Marks(NamedTuple):
    """The marks before and after tokens that carry loss, their legend in words, and the separator of tokens."""

    before: str
    after: str
    legend: str
    bar: str


def marks() -> Marks:
    """Bold green on a terminal with colours, otherwise brackets."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return Marks("\x1b[1;32m", "\x1b[0m", "bold", "\x1b[2m│\x1b[0m")
    try:
        "⟦⟧│".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return Marks("[[", "]]", "in [[ ]]", "|")
    return Marks("⟦", "⟧", "in ⟦ ⟧", "│")


def first(task: Task, examples: Examples) -> str | None:
    """The first example of a task on texts, shortened to a few lines; None for other tasks."""
    if getattr(task, "tokenizer", None) is None:
        return None
    parts = _cut(pieces(task, examples, 0)[0], SHORT)
    text = marked(parts).replace("\n", "\\n")
    return f"first example, {about(task, examples, 0)}:\n  {text}"


def about(task: Task, examples: Examples, row: int) -> str:
    """The length of an example, the number of its tokens that carry loss, and its label."""
    long = len(examples["input_ids"][row])
    facts = [f"{long:,} token{'s' if long != 1 else ''}"]
    if "loss_mask" in examples:
        facts.append(f"{loss_mask_of(examples, row).sum():,} with loss ({marks().legend})")
    if "segment_ids" in examples and (packed := len(np.unique(examples["segment_ids"][row]))) > 1:
        facts.append(f"{packed:,} examples packed")
    if "label" in examples:
        facts.append(label(task, examples["label"][row]))
    return ", ".join(facts)


def label(task: Task, value: Any) -> str:
    """A label by its name, with its number if that differs."""
    names: Sequence[str] = getattr(task, "labels", ())
    if not names:
        return f"label {value:g}"
    return f"label {names[value]!r}" + (f" (class {value})" if names[value] != str(value) else "")


def loss_mask_of(examples: Examples, row: int) -> np.ndarray:
    """Which tokens of an example carry loss, bool [length]; never the first, which has no context."""
    found = np.asarray(examples["loss_mask"][row], bool).copy()
    found[:1] = False
    return found


def pieces(task: Any, examples: Examples, row: int, *, every: bool = False) -> list[list[Piece]]:
    """The text of an example, or of each example packed in it, split into parts with and without loss.

    Args:
      every: whether each token is a separate part.
    """
    ids = examples["input_ids"][row]
    mask = loss_mask_of(examples, row) if "loss_mask" in examples else np.zeros(len(ids), bool)
    segments = examples["segment_ids"][row] if "segment_ids" in examples else np.zeros(len(ids), int)
    found = []
    for number in dict.fromkeys(segments.tolist()):
        own = segments == number
        mine = mask[own]
        borders = range(1, len(mine)) if every else (np.flatnonzero(np.diff(mine)) + 1).tolist()
        texts = split_text(task.tokenizer, ids[own].tolist(), borders)
        starts = [0, *borders]
        found.append([Piece(text, bool(mine[start])) for text, start in zip(texts, starts, strict=True)])
    return found


def split_text(tokenizer: Any, ids: Sequence[int], borders: Sequence[int]) -> list[str]:
    """The text of some tokens, split before those at ``borders``; a character of several tokens joins the later part.

    Each part is decoded with all previous tokens, which can change its text, such as the space before a word.
    """
    whole = _decoded(tokenizer, ids)
    ends = [len(_decoded(tokenizer, ids[:border]).rstrip("\ufffd")) for border in borders]
    places = [0, *itertools.accumulate((min(end, len(whole)) for end in ends), max), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(places)]


def marked(parts: Sequence[Piece], *, bars: bool = False) -> str:
    """A text with the parts that carry loss marked, and optionally with bars between all parts."""
    marks_ = marks()
    bar = marks_.bar if bars else ""
    texts = []
    for loss, group in itertools.groupby(parts, lambda part: part.loss):
        shown = [visible(part.text) for part in group]
        texts.append(bar.join(f"{marks_.before}{one}{marks_.after}" if loss else one for one in shown))
    return bar.join(texts)


def visible(text: str) -> str:
    """A text with invisible characters as escapes: control characters, unusual spaces, joiners."""
    return "".join(
        one if one in "\n\t" or one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _cut(parts: Sequence[Piece], most: int) -> list[Piece]:
    """The parts, each shortened in the middle, so that all stay visible, with about ``most`` characters in total."""
    share = max(most // max(len(parts), 1), 40)
    found: list[Piece] = []
    for part in parts:
        if sum(len(one.text) for one in found) >= most:
            return [*found, Piece(" ...", False)]
        half = share // 2
        text = part.text if len(part.text) <= share + 5 else f"{part.text[:half]} ... {part.text[-half:]}"
        found.append(part._replace(text=text))
    return found
