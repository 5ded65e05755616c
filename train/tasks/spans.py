"""Texts with spans that carry loss in, tokens with a loss mask out.

Spans are in characters. The whole text is tokenized once, and a token with any character of a span carries loss.
So an answer keeps the tokens that it has within its text, and a token across the border of prompt and answer belongs
to the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.lines import in_batches
from train.data.truncation import Truncation
from train.tasks.encoding import CHUNK


class SpannedText(NamedTuple):
    """A text, and its spans that carry loss as ``(start, end)`` in characters."""

    text: str
    spans: list[tuple[int, int]]


class Example(NamedTuple):
    """The tokens of a text.

    Attributes:
      tokens: token ids, [length].
      loss_mask: 1 for tokens that carry loss, else 0; [length].
      joined: whether a token with loss begins before its span.
    """

    tokens: list[int]
    loss_mask: list[int]
    joined: bool = False

    def has_loss(self, limit: int) -> bool:
        """Whether any of the first ``limit`` tokens carries loss; the first token is never predicted."""
        return any(self.loss_mask[1:limit])


class BosEos(NamedTuple):
    """The tokens that begin and end a plain text (usually one each, or none), and both as text."""

    bos: list[int]
    eos: list[int]
    bos_text: str
    eos_text: str

    @classmethod
    def of(cls, tokenizer: Any) -> BosEos:
        """The tokens that the tokenizer puts before a text; and its EOS token, or else those it puts after a text."""
        bare, full = (token_ids("a", tokenizer, add_special_tokens=special) for special in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        eos = full[at + len(bare) :] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = ["".join(tokenizer.convert_ids_to_tokens(tokens)) for tokens in (full[:at], eos)]
        return cls(full[:at], eos, *texts)

    def strip(self, text: SpannedText) -> SpannedText:
        """The text without BOS and EOS, so that they are tokenized neither twice nor as part of a word."""
        stripped = text.text.removeprefix(self.bos_text)
        shift = len(text.text) - len(stripped)
        stripped = stripped.removesuffix(self.eos_text)
        spans = [(max(start - shift, 0), min(end - shift, len(stripped))) for start, end in text.spans]
        return SpannedText(stripped, spans)


def tokenize_plain(texts: Sequence[SpannedText], tokenizer: Any) -> Iterator[Example]:
    """Texts as tokens, each with BOS and EOS exactly once (if the tokenizer has them), written in the text or not.

    EOS carries loss. BOS is never predicted; it is in the loss mask of a text that carries loss from its start.
    """
    ends = BosEos.of(tokenizer)
    for tokens, loss_mask, joined in tokenize([ends.strip(text) for text in texts], tokenizer):
        first = int(loss_mask[:1] == [1])
        mask = [*[first] * len(ends.bos), *loss_mask, *[1] * len(ends.eos)]
        yield Example([*ends.bos, *tokens, *ends.eos], mask, joined)


def plain_prompt(text: str, tokenizer: Any) -> list[int]:
    """The tokens that prompt the continuation of a plain text."""
    ends = BosEos.of(tokenizer)
    return [*ends.bos, *token_ids(text.removeprefix(ends.bos_text), tokenizer)]


def tokenize(texts: Sequence[SpannedText], tokenizer: Any) -> Iterator[Example]:
    """Texts as tokens, without adding special tokens."""
    for part in in_batches(texts, CHUNK):
        yield from _tokenize_chunk(part, tokenizer)


def token_ids(text: str, tokenizer: Any, *, add_special_tokens: bool = False) -> list[int]:
    """The token ids of a text."""
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _tokenize_chunk(texts: Sequence[SpannedText], tokenizer: Any) -> Iterator[Example]:
    fast = getattr(tokenizer, "is_fast", False)
    found = tokenizer([text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    spaces = token_ids("a", tokenizer) != token_ids(" a", tokenizer)
    for i, text in enumerate(texts):
        tokens = list(found["input_ids"][i])
        offsets = np.asarray(found["offset_mapping"][i], np.int64).reshape(-1, 2) if fast else None
        if offsets is None or not _cover(offsets, text.text):
            yield Example(tokens, *_mask_by_prefixes(text, tokens, tokenizer))
        else:
            yield Example(tokens, *_mask_by_offsets(text, _with_spaces(offsets) if spaces else offsets))


def _cover(offsets: np.ndarray, text: str) -> bool:
    """Whether every character except whitespace is in a token: some tokenizers return wrong offsets."""
    steps = np.zeros(len(text) + 1, np.int64)
    np.add.at(steps, offsets[:, 0], 1)
    np.add.at(steps, offsets[:, 1], -1)
    return all(text[i].isspace() for i in np.flatnonzero(steps.cumsum()[:-1] == 0))


def _with_spaces(offsets: np.ndarray) -> np.ndarray:
    """Offsets that include the spaces before a token, if the tokenizer leaves them out (``trim_offsets``)."""
    before = np.maximum.accumulate(np.concatenate([[0], offsets[:-1, 1]])) if len(offsets) else offsets[:, 0]
    return np.stack([np.minimum(offsets[:, 0], before), offsets[:, 1]], axis=1)


def _mask_by_offsets(text: SpannedText, offsets: np.ndarray) -> tuple[list[int], bool]:
    """``(loss_mask, joined)``; an empty token counts with the character at its position."""
    inside = np.zeros(len(text.text) + 1, np.int64)
    for start, end in text.spans:
        inside[start:end] = 1
    before = np.concatenate([[0], inside.cumsum()])
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    loss_mask = before[ends] > before[starts]
    joined = any(((starts < start) & (ends > start)).any() for start, end in text.spans if start < end)
    return loss_mask.astype(int).tolist(), bool(joined)


def _mask_by_prefixes(text: SpannedText, tokens: list[int], tokenizer: Any) -> tuple[list[int], bool]:
    """``(loss_mask, joined)`` without offsets: tokens missing in a prefix of the text reach beyond it."""
    loss_mask, joined = [0] * len(tokens), False
    for start, end in text.spans:
        if start == end:
            continue
        first, last = (token_ids(text.text[:place], tokenizer) for place in (start, end))
        begin, stop = _common_prefix(first, tokens), _common_prefix(last, tokens)
        stop += stop < min(len(last), len(tokens))
        loss_mask[begin:stop] = [1] * (stop - begin)
        joined |= begin < len(first)
    return loss_mask, joined


def _common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """The number of equal tokens at the start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


# Truncation and packing


def truncate(examples: Sequence[Example], limit: int) -> tuple[list[Example], Truncation]:
    """The examples truncated on the right to ``limit`` tokens, without those left with no loss; and the truncation."""
    lost, ends = 0, 0
    for example in examples:
        cut = sum(example.loss_mask[max(limit, 1) :])
        lost += cut
        ends += cut > 0 and example.loss_mask[-1]
    kept = [Example(one.tokens[:limit], one.loss_mask[:limit], one.joined) for one in examples if one.has_loss(limit)]
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


def pack(examples: Iterable[Example], length: int) -> Iterator[tuple[Example, list[int]]]:
    """Examples packed in order into rows of at most ``length`` tokens, each with the segment of every token (from 1).

    A segment's first token is not predicted, so it carries no loss.
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
