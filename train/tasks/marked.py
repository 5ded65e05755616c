"""Texts of which some parts carry loss, and the same as tokens.

Which tokens carry loss is decided by characters: the whole text is tokenized once, and a token that holds any
character of such a part carries loss. So an answer is tokenized as it stands in its text, and tokens that join the end
of a prompt with the start of its answer are part of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.truncation import Truncation

CHUNK = 1000
"""Texts that are tokenized at once: offsets take far more memory than the tokens that remain."""


class Marked(NamedTuple):
    """A text, and its parts that carry loss, as ``(start, end)``, in characters."""

    text: str
    spans: list[tuple[int, int]]


class Example(NamedTuple):
    """One example: its tokens, which of them carry loss, and whether one of these begins before its part."""

    tokens: list[int]
    loss_mask: list[int]
    joined: bool = False

    def learns(self, limit: int) -> bool:
        """Whether one of the first ``limit`` tokens carries loss; the first has nothing to be predicted from."""
        return any(self.loss_mask[1:limit])


class Frame(NamedTuple):
    """What stands around a plain text: the tokens in front of it and behind it, and both as text."""

    begin: list[int]
    end: list[int]
    begin_text: str
    end_text: str


def frame(tokenizer: Any) -> Frame:
    """What a tokenizer puts in front of a text; and its end token, or without one what it puts behind a text."""
    bare, full = (list(tokenizer("a", add_special_tokens=own)["input_ids"]) for own in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    end = full[at + len(bare) :] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    words = ["".join(tokenizer.convert_ids_to_tokens(tokens)) for tokens in (full[:at], end)]
    return Frame(full[:at], end, *words)


def plain(marked: Sequence[Marked], tokenizer: Any) -> Iterator[Example]:
    """Texts as tokens, each with one begin and one end token (where the tokenizer has them), be they in it or not.

    The end token carries loss.
    """
    around = frame(tokenizer)
    for tokens, loss_mask, joined in tokenized([_bare(one, around) for one in marked], tokenizer):
        first = int(
            loss_mask[:1] == [1]
        )  # the begin token cannot be predicted; it carries loss where all of the text does
        yield Example(
            [*around.begin, *tokens, *around.end],
            [*[first] * len(around.begin), *loss_mask, *[1] * len(around.end)],
            joined,
        )


def plain_prompt(text: str, tokenizer: Any) -> list[int]:
    """The tokens after which the rest of a plain text is generated."""
    around = frame(tokenizer)
    return [*around.begin, *ids(text.removeprefix(around.begin_text), tokenizer)]


def _bare(marked: Marked, around: Frame) -> Marked:
    """A text without its begin and end token, so that these are tokenized neither twice nor as part of a word."""
    text = marked.text.removeprefix(around.begin_text)
    shift = len(marked.text) - len(text)
    text = text.removesuffix(around.end_text)
    return Marked(text, [(max(start - shift, 0), min(end - shift, len(text))) for start, end in marked.spans])


def tokenized(marked: Sequence[Marked], tokenizer: Any) -> Iterator[Example]:
    """Texts as tokens, with no special tokens but those in them."""
    for start in range(0, len(marked), CHUNK):
        yield from _chunk(marked[start : start + CHUNK], tokenizer)


def ids(text: str, tokenizer: Any) -> list[int]:
    """A text as tokens, with no special tokens but those in it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chunk(marked: Sequence[Marked], tokenizer: Any) -> Iterator[Example]:
    fast = getattr(tokenizer, "is_fast", False)
    found = tokenizer(
        [text for text, _ in marked], add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    spaces = ids("a", tokenizer) != ids(" a", tokenizer)
    for i, one in enumerate(marked):
        tokens = list(found["input_ids"][i])
        offsets = np.asarray(found["offset_mapping"][i], np.int64).reshape(-1, 2) if fast else None
        if offsets is None or not _cover(offsets, one.text):
            yield Example(tokens, *_by_prefixes(one, tokens, tokenizer))
        else:
            yield Example(tokens, *_by_offsets(one, _with_spaces(offsets) if spaces else offsets))


def _cover(offsets: np.ndarray, text: str) -> bool:
    """Whether every character but spaces lies in a token: not all tokenizers tell offsets truly."""
    steps = np.zeros(len(text) + 1, np.int64)
    np.add.at(steps, offsets[:, 0], 1)
    np.add.at(steps, offsets[:, 1], -1)
    return all(text[i].isspace() for i in np.flatnonzero(steps.cumsum()[:-1] == 0))


def _with_spaces(offsets: np.ndarray) -> np.ndarray:
    """Offsets with the spaces that tokens begin with, of a tokenizer that leaves them out (``trim_offsets``)."""
    before = np.maximum.accumulate(np.concatenate([[0], offsets[:-1, 1]])) if len(offsets) else offsets[:, 0]
    return np.stack([np.minimum(offsets[:, 0], before), offsets[:, 1]], axis=1)


def _by_offsets(marked: Marked, offsets: np.ndarray) -> tuple[list[int], bool]:
    """Which tokens hold a character of a part that carries loss; one without width belongs to the character there."""
    inside = np.zeros(len(marked.text) + 1, np.int64)
    for start, end in marked.spans:
        inside[start:end] = 1
    before = np.concatenate([[0], inside.cumsum()])
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    loss_mask = before[ends] > before[starts]
    joined = any(((starts < start) & (ends > start)).any() for start, end in marked.spans if start < end)
    return loss_mask.astype(int).tolist(), bool(joined)


def _by_prefixes(marked: Marked, tokens: list[int], tokenizer: Any) -> tuple[list[int], bool]:
    """The same without offsets: a token that a text cut at a place does not have reaches beyond that place."""
    loss_mask, joined = [0] * len(tokens), False
    for start, end in marked.spans:
        if start == end:
            continue
        first, last = (ids(marked.text[:place], tokenizer) for place in (start, end))
        begin, stop = _shared(first, tokens), _shared(last, tokens)
        stop += stop < min(len(last), len(tokens))
        loss_mask[begin:stop] = [1] * (stop - begin)
        joined |= begin < len(first)
    return loss_mask, joined


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


# What fits


def shortened(examples: Sequence[Example], limit: int) -> tuple[list[Example], Truncation]:
    """The examples cut on the right to ``limit`` tokens, without those that have no token of loss left; what was lost.

    The first token of an example has nothing to be predicted from, so it never carries loss.
    """
    lost, ends = 0, 0
    for example in examples:
        gone = sum(example.loss_mask[max(limit, 1) :])
        lost += gone
        ends += gone > 0 and example.loss_mask[-1]
    kept = [Example(one.tokens[:limit], one.loss_mask[:limit], one.joined) for one in examples if one.learns(limit)]
    return kept, Truncation(
        limit=limit,
        examples=len(examples),
        longest=max((len(one.tokens) for one in examples), default=0),
        cut=sum(len(one.tokens) > limit for one in examples),
        dropped=len(examples) - len(kept),
        tokens=sum(sum(one.loss_mask[1:]) for one in examples),
        lost=lost,
        ends=ends,
    )


def packed(examples: Sequence[Example], length: int) -> Iterator[tuple[Example, list[int]]]:
    """Examples put into rows of at most ``length`` tokens in their order, with the number of each token's segment.

    The first token of a segment has nothing to be predicted from, so it carries no loss.
    """
    row, segments = Example([], []), []
    for tokens, loss_mask, _ in examples:
        if row.tokens and len(row.tokens) + len(tokens) > length:
            yield row, segments
            row, segments = Example([], []), []
        row.tokens.extend(tokens)
        row.loss_mask.extend([0, *loss_mask[1:]])
        segments.extend([segments[-1] + 1 if segments else 1] * len(tokens))
    yield row, segments
