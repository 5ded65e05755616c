"""Causal language modelling: supervised fine-tuning on prompts and completions, conversations, or plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jinja2 import TemplateError

from train import metrics
from train.batches import Batch, Examples, Ragged
from train.config import CausalLM, ConfigError
from train.data import Table, column, texts
from train.processes import say
from train.tasks.base import Measured, cross_entropy


class Example(NamedTuple):
    """One example: its tokens, and which of them are learnt."""

    tokens: list[int]
    learnt: list[int]


class LanguageModel:
    """The loss is that of the learnt tokens, each predicted from those before it."""

    primary = "loss"
    higher_is_better = False

    def __init__(self, config: CausalLM, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        if config.template is not None:
            tokenizer.chat_template = config.template
        if (config.chat or config.messages) and tokenizer.chat_template is None:
            raise ConfigError(
                "task: the tokenizer of this checkpoint has no chat template; expected one for "
                + ("messages" if config.messages else "chat=True")
                + ". Pass --task.template with a Jinja template, or use prompt and completion without --task.chat"
            )

    # From tables to examples

    def encode(self, table: Table) -> dict[str, Examples]:
        """Tokens, mask, which tokens are learnt, and when packed segments: int32 [length] for each example.

        Raises:
          ConfigError: if a conversation does not fit the template, or no example has a token to learn.
        """
        config = self.config
        sequences = [self._cut(sequence) for sequence in self._sequences(table)]
        kept = [sequence for sequence in sequences if any(sequence.learnt[1:])]
        if not kept:
            raise ConfigError(
                f"task: none of the {len(sequences)} examples has a token to learn within max_length = "
                f"{config.max_length}; pass a larger --task.max-length, or check the columns"
            )
        if dropped := len(sequences) - len(kept):
            table.drop(dropped, f"without a token to learn within {config.max_length} tokens")
            say(f"left out {dropped} of {len(sequences)} examples: no token to learn within {config.max_length} tokens")
        if config.pack:
            return {"": _columns(list(_packed(kept, config.max_length)), self.pad)}
        return {"": _columns([(sequence, None) for sequence in kept], self.pad)}

    @property
    def pad(self) -> int:
        """The token that fills batches up; the mask tells it from text."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def _cut(self, sequence: Example) -> Example:
        return Example(*(part[: self.config.max_length] for part in sequence))

    def _sequences(self, table: Table) -> Iterator[Example]:
        config = self.config
        if config.messages is not None:
            for row, messages in enumerate(column(table, config.messages, "task.messages")):
                yield self._conversation(_checked(messages, row))
        elif config.text is not None:
            for text in texts(table, config.text, "task.text"):
                tokens = [*self._ids(text, special=True), *self._end()]
                yield Example(tokens, [1] * len(tokens))
        else:
            assert config.prompt is not None and config.completion is not None
            prompts = texts(table, config.prompt, "task.prompt")
            completions = texts(table, config.completion, "task.completion")
            for prompt, completion in zip(prompts, completions, strict=True):
                if config.chat:
                    yield self._conversation(
                        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                    )
                else:
                    yield self._continued(prompt, completion)

    def _continued(self, prompt: str, completion: str) -> Example:
        before, after = self._ids(prompt, special=True), [*self._ids(completion, special=False), *self._end()]
        return Example([*before, *after], [int(self.config.learn_prompt)] * len(before) + [1] * len(after))

    def _conversation(self, messages: list[dict[str, str]]) -> Example:
        """A conversation in the chat template; the assistant's messages and what closes them are learnt."""
        if self.config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system}, *messages]
        whole = self._template(messages)
        learnt = [int(self.config.learn_prompt)] * len(whole)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:i], add_generation_prompt=True)
            upto = self._template(messages[: i + 1])
            if upto[: len(before)] != before or whole[: len(upto)] != upto:
                raise ConfigError(
                    "task: the chat template changes earlier messages when later ones follow, so it cannot be told "
                    f"which tokens are the assistant's in {messages!r:.300}. Pass a --task.template that appends, or "
                    "--task.learn-prompt"
                )
            learnt[len(before) : len(upto)] = [1] * (len(upto) - len(before))
        return Example(whole, learnt)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The tokens after which an answer to ``prompt`` is generated."""
        if not (self.config.chat or self.config.messages):
            return self._ids(prompt, special=True)
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        return self._template([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:  # a template may refuse roles, or be none
            raise ConfigError(
                f"task: the chat template cannot show {messages!r:.200}: {type(error).__name__}: {error}. Change the "
                "messages, or pass a --task.template"
            ) from error
        return self._ids(text, special=False)  # the template writes the special tokens itself

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    # From outputs to figures

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "segment_ids") if name in batch}

    def loss(self, outputs: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Cross entropy of the learnt tokens; ``outputs`` are logits [batch, length, vocabulary]."""
        losses, learnt = _token_losses(outputs, batch, smoothing)
        return losses.sum(), learnt.sum().astype(jnp.float32)

    def measure(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Of each example: the loss, how many tokens are learnt and guessed right, a checksum of the guesses."""
        losses, learnt = _token_losses(outputs, batch)
        guesses = outputs[:, :-1].argmax(axis=-1)
        right = (guesses == batch["input_ids"][:, 1:]) * learnt
        places = jnp.arange(1, guesses.shape[1] + 1, dtype=jnp.uint32)
        checksum = (guesses.astype(jnp.uint32) * learnt.astype(jnp.uint32) * (2 * places + 1)).sum(axis=1)
        return {
            "loss": losses.sum(axis=1),
            "tokens": learnt.sum(axis=1),
            "right": right.sum(axis=1),
            "guesses": checksum,
        }

    def metrics(self, measured: Measured) -> dict[str, float]:
        return metrics.language_model(measured["loss"], measured["tokens"], measured["right"])

    def predictions(self, measured: Measured) -> np.ndarray:
        """A checksum of each example's likeliest next tokens, uint32 [n]."""
        return measured["guesses"]


def _checked(messages: Any, row: int) -> list[dict[str, str]]:
    """The messages of a row.

    Raises:
      ConfigError: if they are none.
    """
    sound = isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages)
    if not sound or any(not isinstance(message.get(part), str) for message in messages for part in ("role", "content")):
        raise ConfigError(
            f"task.messages: row {row} holds {messages!r:.200}; expected a list of one or more "
            '{"role": "user", "content": "..."}'
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _token_losses(logits: jax.Array, batch: Batch, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The loss of each token but the first, 0 where it is not learnt, and where it is; [batch, length - 1] both."""
    learnt = jnp.asarray(batch["learnt"])[:, 1:]
    losses = cross_entropy(logits[:, :-1], jnp.asarray(batch["input_ids"])[:, 1:], smoothing)
    return losses * learnt, learnt


def _packed(sequences: Sequence[Example], length: int) -> Iterator[tuple[Example, list[int]]]:
    """Sequences put into rows of at most ``length`` tokens in their order, with the number of each token's segment.

    The first token of a segment has nothing to be predicted from, so it is not learnt.
    """
    row, segments = Example([], []), []
    for tokens, learnt in sequences:
        if row.tokens and len(row.tokens) + len(tokens) > length:
            yield row, segments
            row, segments = Example([], []), []
        row.tokens.extend(tokens)
        row.learnt.extend([0, *learnt[1:]])
        segments.extend([segments[-1] + 1 if segments else 1] * len(tokens))
    yield row, segments


def _columns(rows: Sequence[tuple[Example, list[int] | None]], pad: int) -> Examples:
    examples = {
        "input_ids": Ragged([sequence.tokens for sequence, _ in rows], pad),
        "attention_mask": Ragged([[1] * len(sequence.tokens) for sequence, _ in rows], 0),
        "learnt": Ragged([sequence.learnt for sequence, _ in rows], 0),
    }
    if rows and rows[0][1] is not None:
        examples["segment_ids"] = Ragged([segments or [] for _, segments in rows], 0)
    return examples
