"""Causal language modelling: supervised fine-tuning on prompts and completions, conversations, or plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import TokenLosses
from train.compute.processes import say
from train.config import CausalLM, ConfigError
from train.data.batches import Batch, Examples, Ragged
from train.data.tables import Table, cells, column, texts
from train.data.truncation import Truncation
from train.tasks import metrics
from train.tasks.base import Measured
from train.tasks.chat import Chat
from train.tasks.conversations import Message, messages_of, tools_of
from train.tasks.spans import Example, SpannedText, pack, plain_prompt, token_ids, tokenize, tokenize_plain, truncate


class LanguageModel:
    """Cross entropy of the tokens that carry loss, each predicted from the previous ones."""

    primary = "loss"
    higher_is_better = False

    def __init__(self, config: CausalLM, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        self.chat = Chat(tokenizer, config.system) if config.chat or config.messages else None
        if self.chat and tokenizer.chat_template is None:
            raise ConfigError(
                "task: the tokenizer of this checkpoint has no chat template; expected one for "
                + ("messages" if config.messages else "chat=True")
                + ". Pass --task.template with a Jinja template, or use prompt and completion without --task.chat"
            )

    # From tables to examples

    def encode(self, table: Table) -> dict[str, Examples]:
        """``input_ids``, ``attention_mask``, ``loss_mask``, and ``segment_ids`` if packed: int32 [length] per example.

        A row is one example; a conversation may be several (see `train.tasks.chat`).

        Raises:
          ConfigError: if a conversation does not fit the template, or no example has a token that carries loss.
        """
        config, limit = self.config, self.config.max_length
        rows, spanned = zip(*self._spanned_texts(table), strict=True) if len(table) else ((), ())
        examples = list((tokenize if self.chat else tokenize_plain)(spanned, self.tokenizer))
        kept, truncation = truncate(examples, limit)
        if not kept:
            raise ConfigError(
                f"task: none of the {len(examples)} examples has a token that carries loss within max_length = "
                f"{limit}; pass a larger --task.max-length, or check the columns"
            )
        used = {row for row, example in zip(rows, examples, strict=True) if example.has_loss(limit)}
        table.count_dropped(len(table) - len(used), f"without a token that carries loss within {limit} tokens")
        if joined := sum(example.joined for example in kept):
            say(
                f"in {joined} of {len(kept)} examples one token spans the end of a prompt and the start of its answer, "
                "and carries loss. If it is a space, end prompts (or the template's generation prompt) without it"
            )
        packed = list(pack(kept, limit)) if config.pack else [(example, None) for example in kept]
        return {"": _columns(packed, self.pad, truncation)}

    @property
    def pad(self) -> int:
        """The padding token; the attention mask distinguishes it from text."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: EOS, and the chat template's end of a turn."""
        tokenizer = self.tokenizer
        closing = None if self.chat is None or self.chat.end is None else token_ids(self.chat.end, tokenizer)[-1]
        return sorted({tokenizer.eos_token_id, closing} - {None})

    def prompt_tokens(self, prompt: str | list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The tokens that prompt an answer to ``prompt``.

        In an example, these precede the tokens that carry loss, except for a token that spans both.

        Args:
          prompt: a text; or, for a run on conversations, the messages to answer.
          tools: for the chat template, as from `tools_of`.
        """
        if self.chat is None:
            assert isinstance(prompt, str)
            return plain_prompt(prompt, self.tokenizer)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return token_ids(self.chat.prompt(messages, tools), self.tokenizer)

    def _spanned_texts(self, table: Table) -> list[tuple[int, SpannedText]]:
        """The texts of all rows, each with the index of its row."""
        config = self.config
        if config.messages is not None:
            return self._conversations(table, column(table, config.messages, "task.messages"))
        if config.text is not None:
            whole = texts(table, config.text, "task.text")
            return [(row, SpannedText(text, [(0, len(text))])) for row, text in enumerate(whole)]
        assert config.prompt is not None and config.completion is not None
        prompts = texts(table, config.prompt, "task.prompt")
        pairs = list(zip(prompts, texts(table, config.completion, "task.completion"), strict=True))
        if self.chat:
            turns = [({"role": "user", "content": one}, {"role": "assistant", "content": two}) for one, two in pairs]
            return self._conversations(table, list(map(list, turns)))
        starts = [0 if config.learn_prompt else len(one) for one, _ in pairs]
        return [(row, SpannedText(one + two, [(starts[row], len(one + two))])) for row, (one, two) in enumerate(pairs)]

    def _tools(self, table: Table) -> Sequence[Any]:
        """The tools of each row, if any."""
        name = self.config.tools
        if name is None:
            return [None] * len(table)
        return cells(table, name) if name in table.column_names else column(table, name, "task.tools")

    def _conversations(self, table: Table, conversations: Sequence[Any]) -> list[tuple[int, SpannedText]]:
        """Each conversation as one span, or as texts with the assistant's turns as spans."""
        assert self.chat is not None
        found: list[tuple[int, SpannedText]] = []
        unread: Counter[str] = Counter()
        for row, (raw, of_row) in enumerate(zip(conversations, self._tools(table), strict=True)):
            try:
                messages, known = messages_of(raw), tools_of(of_row)
                if self.config.learn_prompt:
                    turns = [self.chat.whole(messages, known)]
                else:
                    # A conversation without a turn counts as an example without a token that carries loss.
                    turns = self.chat.turns(messages, known) or [SpannedText(self.chat.whole(messages, known).text, [])]
            except ConfigError as error:
                field = "messages" if self.config.messages else "chat"
                raise ConfigError(f"task.{field}: {table.locate([row])}: {error}") from error
            found += [(row, turn) for turn in turns]
            unread.update(self.chat.unread_keys(messages))
        if unread:
            keys = ", ".join(f"{key} (in {count} rows)" for key, count in sorted(unread.items()))
            say(f"the chat template does not read these keys of messages: {keys}")
        if len(found) > len(conversations):
            say(
                f"{len(conversations)} conversations become {len(found)} examples: the chat template renders earlier "
                "turns differently from how it generates them, so each carries loss where it is generated"
            )
        return found

    # From outputs to metrics

    def inputs(self, batch: Batch, smoothing: float = 0.0) -> dict[str, Any]:
        found = {name: batch[name] for name in ("input_ids", "attention_mask", "segment_ids") if name in batch}
        # All positions have a label, so that lengths stay even; the last one is not used.
        labels = jnp.roll(jnp.asarray(batch["input_ids"]), -1, axis=1)
        return found | {"labels": labels} | ({"smoothing": smoothing} if smoothing else {})

    def loss(self, outputs: TokenLosses, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Cross entropy of the tokens that carry loss, summed. The network has smoothed it."""
        losses, loss_mask = _masked(outputs.loss, batch)
        return losses.sum(), loss_mask.sum().astype(jnp.float32)

    def measure(self, outputs: TokenLosses, batch: Batch) -> dict[str, jax.Array]:
        """Per example: the summed loss, the tokens that carry loss, the correct ones, a checksum of the predictions."""
        losses, loss_mask = _masked(outputs.loss, batch)
        guesses = outputs.prediction[:, :-1]
        right = (guesses == batch["input_ids"][:, 1:]) * loss_mask
        places = jnp.arange(1, guesses.shape[1] + 1, dtype=jnp.uint32)
        checksum = (guesses.astype(jnp.uint32) * loss_mask.astype(jnp.uint32) * (2 * places + 1)).sum(axis=1)
        return {
            "loss": losses.sum(axis=1),
            "tokens": loss_mask.sum(axis=1),
            "right": right.sum(axis=1),
            "guesses": checksum,
        }

    def metrics(self, measured: Measured) -> dict[str, float]:
        return metrics.language_model(measured["loss"], measured["tokens"], measured["right"])

    def predictions(self, measured: Measured) -> np.ndarray:
        """A checksum of each example's most likely next tokens, uint32 [n]."""
        return measured["guesses"]


def _masked(losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of each token except the first, 0 outside the loss mask, and that mask; both [batch, length - 1]."""
    loss_mask = jnp.asarray(batch["loss_mask"])[:, 1:]
    return losses[:, :-1] * loss_mask, loss_mask


def _columns(rows: Sequence[tuple[Example, list[int] | None]], pad: int, truncation: Truncation) -> Examples:
    examples = {
        "input_ids": Ragged([example.tokens for example, _ in rows], pad, truncation=truncation),
        "attention_mask": Ragged([[1] * len(example.tokens) for example, _ in rows], 0),
        "loss_mask": Ragged([example.loss_mask for example, _ in rows], 0),
    }
    if rows and rows[0][1] is not None:
        examples["segment_ids"] = Ragged([segments or [] for _, segments in rows], 0)
    return examples
