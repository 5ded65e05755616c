"""Messages in, texts rendered by the chat template out, with the assistant's turns as spans.

A turn carries loss in the text where it is generated: the conversation up to the turn, which follows the generation
prompt. Most templates render a turn the same way when the conversation continues, so one text holds all turns. A
template that does not (it drops earlier thinking, or moves tools to the last question) yields a new text at each such
point.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from train.config import ConfigError
from train.tasks.conversations import Message, function_of
from train.tasks.spans import SpannedText

ANOTHER_TEMPLATE = "pass a --task.template that renders it (Jinja, or a file with it)"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBES = ("jloraOne", "jloraTwo")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters, reserved for internal use: no text has them
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_CAPTURE = re.compile(r"\{%[-+]?\s*(macro|call|filter|set\s+[^=%]*%\}|for\s[^%]*\brecursive\b)")
"""Blocks that Jinja renders before placing their text, so that transformers misplaces marks in them."""


class Chat:
    """A tokenizer's chat template.

    Args:
      tokenizer: must have a chat template.
      system: the system message for conversations without one, or None.

    All methods raise a ConfigError without the row; the caller adds it.
    """

    def __init__(self, tokenizer: Any, system: str | None = None):
        self._tokenizer, self._system = tokenizer, system
        self._special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._rendered: set[tuple[str, str]] = set()

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[SpannedText]:
        """Texts with the assistant's turns, each a span in one of them; empty without a turn.

        Args:
          messages, tools: as from `messages_of` and `tools_of`.
        """
        messages, found, seen = self._complete(messages), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self._last_turn(messages[: i + 1], tools)
            self._check_rendered(messages[: i + 1], seen, turn, tools)
            seen = i + 1
            if found and turn.text.startswith(found[-1].text):
                turn = SpannedText(turn.text, [*found.pop().spans, *turn.spans])
            found.append(turn)
        return found

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> SpannedText:
        """A rendered conversation, as one span."""
        messages = self._complete(messages)
        text = self._render(messages, tools)
        spanned = SpannedText(text, [(0, len(text))])
        self._check_rendered(messages, 0, spanned, tools, thoughts=False)
        return spanned

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text that prompts the assistant's next turn."""
        return self._render(self._complete(messages), tools, prompt=True)

    def unread_keys(self, messages: Sequence[Message]) -> set[str]:
        """Message keys that the template never names, so cannot read."""
        source = self._source(None)
        keys = {key for one in messages for key in one}.difference(_REASONING)  # transformers fills in the aliases
        return {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", source)}

    @functools.cached_property
    def end(self) -> str | None:
        """The special token that ends a turn of the assistant, or None."""
        try:
            text, spans = self._last_turn([_message("user", _PROBES[0]), _message("assistant", _PROBES[1])], None)
        except ConfigError:
            return None
        return next((token for token in self._special if spans and text[: spans[-1][1]].endswith(token)), None)

    def _complete(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with the default system message, and contents in the template's form."""
        start = [] if self._system is None or messages[0]["role"] == "system" else [_message("system", self._system)]
        return [*start, *(message | self._joined_parts(message) for message in messages)]

    def _joined_parts(self, message: Message) -> Message:
        """Text parts joined by newlines for a template that takes only strings, as vLLM and llama.cpp do."""
        parts = message.get("content")
        if not isinstance(parts, list) or self._takes_parts:
            return {}
        return {"content": "\n".join(part["text"] for part in parts)}

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template renders a list of text parts like a string."""
        text, parts = _PROBES[0], [{"type": "text", "text": _PROBES[0]}]
        try:
            return len({self._render([_message("user", content)], None) for content in (text, parts)}) == 1
        except ConfigError:
            return False

    # A turn

    def _last_turn(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> SpannedText:
        """A conversation that ends with an assistant's turn, with that turn as its span."""
        text = self._render(messages, tools)
        if _GENERATION.search(self._source(tools)):
            # Earlier turns are marked too, like in the conversation without the last one.
            earlier = messages[:-1] if any(one["role"] == "assistant" for one in messages[:-1]) else []
            before = self._marked(earlier, tools).spans if earlier else []
            marked = self._marked(messages, tools)
            if marked.text != text:
                raise ConfigError(
                    "the chat template changes the text between {% generation %} and {% endgeneration %} afterwards, "
                    "so that it cannot be found. Pass a --task.template that marks text as it writes it"
                )
            return SpannedText(text, marked.spans[len(before) :])
        before = self._prompt_before(messages, tools)
        if not text.startswith(before):
            text = self._moved_to(before, messages, text, tools)
        # A turn ends with its end token, at which generation stops; templates often start a new line after it.
        closed = text.rstrip()
        return SpannedText(text, [(len(before), len(closed) if closed.endswith(self._special) else len(text))])

    def _moved_to(self, before: str, messages: Sequence[Message], text: str, tools: Sequence[Any] | None) -> str:
        """The prompt ``before`` and the turn after it, for a ``text`` that renders earlier messages differently.

        In both, the earlier part ends with the last question and the generation prompt. (Mistral's template puts the
        system message before a final question, but not once it is answered.)
        """
        *earlier, turn = messages
        question = earlier[-1].get("content") if earlier else None
        if isinstance(question, str) and (question := question.strip()) in before:
            end = before[before.rindex(question) :]
            # Located with a different answer: the real one may repeat the question.
            at = self._render([*earlier, turn | {"content": _PROBES[0]}], tools).rfind(end)
            if at >= 0 and text[at:].startswith(end):
                return before + text[at + len(end) :]
        shared = len(os.path.commonprefix([text, before]))
        raise ConfigError(
            f"the chat template's generation prompt ends in {before[shared:][:80]!r} where its text of the assistant's "
            f"message continues with {text[shared:][:80]!r}, so the model would be trained on answers that it cannot "
            "generate. Pass a --task.template whose turns begin with its generation prompt, or that marks them with "
            "{% generation %} and {% endgeneration %}; or --task.learn-prompt, which trains on the whole text"
        )

    def _prompt_before(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The text that prompts the last message."""
        *earlier, turn = messages
        if earlier:
            try:
                return self._render(earlier, tools, prompt=True)
            except ConfigError:  # some templates reject a conversation without a question
                pass
        # The common start of any answer, up to the generation prompt.
        texts = [self._render([*earlier, turn | {"content": probe}], tools) for probe in ("a", "b")]
        begin, opening = os.path.commonprefix(texts), self._generation_prompt
        return begin[: begin.rindex(opening) + len(opening)] if opening and opening in begin else begin.rstrip()

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """The generation prompt alone."""
        question = [_message("user", _PROBES[0])]
        try:
            return self._render(question, None, prompt=True).removeprefix(self._render(question, None))
        except ConfigError:
            return ""

    # The template

    def _source(self, tools: Sequence[Any] | None) -> str:
        try:
            return self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, no default
            raise ConfigError(f"{str(error).splitlines()[0]} Or pass --task.template") from error

    def _render(
        self, messages: Sequence[Message], tools: Any, *, prompt: bool = False, source: str | None = None
    ) -> str:
        with _template_errors(messages):
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )

    def _marked(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> SpannedText:
        """The text, with the spans marked by `{% generation %}`."""
        source = self._source(tools)
        if not _CAPTURE.search(source):
            from transformers.utils.chat_template_utils import render_jinja_template  # takes half a second to import

            options: dict[str, Any] = {**self._tokenizer.special_tokens_map, "return_assistant_tokens_mask": True}
            with _template_errors(messages):
                rendered: Any = render_jinja_template([list(messages)], tools, chat_template=source, **options)  # pyright: ignore[reportArgumentType]
            return SpannedText(rendered[0][0], rendered[1][0])
        # Characters follow the marked text wherever the template puts it. The `if` takes over the tag's whitespace
        # control, which would not reach past the character.
        source = _GENERATION.sub(
            lambda tag: (
                f"{{%{tag[1]} endif %}}{_CLOSE}{{% endgeneration {tag[3]}%}}"
                if tag[2]
                else f"{{%{tag[1]} generation %}}{_OPEN}{{% if true {tag[3]}%}}"
            ),
            source,
        )
        text, spans = "", []
        for part in re.split(f"([{_OPEN}{_CLOSE}])", self._render(messages, tools, source=source)):
            if part == _OPEN:
                spans.append((len(text), len(text)))
            elif part == _CLOSE:
                spans[-1] = (spans[-1][0], len(text))
            else:
                text += part
        return SpannedText(text, spans)

    # What the template leaves out

    def _check_rendered(
        self, messages: Sequence[Message], since: int, turn: SpannedText, tools: Any, *, thoughts: bool = True
    ) -> None:
        """Raises a ConfigError if the template leaves out part of a message from ``since`` on, or a tool.

        Without ``thoughts`` it may leave out the assistant's thinking, as many do in a continued conversation.
        """
        for i, message in enumerate(messages[since:], since):
            own = turn.text[turn.spans[0][0] :] if message["role"] == "assistant" and turn.spans else turn.text
            for key in ("content", "tool_calls", *(_REASONING if thoughts else ())):
                value = message.get(key)
                if not value or ((message["role"], key) in self._rendered and _holds(own, value)):
                    continue
                probed = [*messages[:i], message | {key: _with_probes(value)}, *messages[i + 1 :]]
                text = self._last_turn(probed, tools).text if thoughts else self._render(probed, tools)
                if not all(probe in text for probe in _PROBES[0 if thoughts else 1 :]):
                    raise ConfigError(
                        f"the chat template leaves out the {key!r} of message {i}, {message['role']!r}, or a part of "
                        f"it: {value!r:.120}. Remove it from the data, or {ANOTHER_TEMPLATE}"
                    )
                self._rendered.add((message["role"], key))
        for tool in tools or ():
            if (name := function_of(tool).get("name")) and str(name) not in turn.text:
                raise ConfigError(f"the chat template leaves out the tool {name!r}; remove it, or {ANOTHER_TEMPLATE}")


@contextlib.contextmanager
def _template_errors(messages: Sequence[Message]) -> Iterator[None]:
    """Converts errors of a template to ConfigErrors."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template cannot render messages of {roles}: {type(error).__name__}: {error}. Change the "
            "messages, or pass another --task.template"
        ) from error


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _holds(text: str, value: Any) -> bool:
    """Whether a text contains a value, up to whitespace; not for tool calls, whose form each template chooses."""
    if isinstance(value, list):
        return all(isinstance(part, dict) and "text" in part and _holds(text, part["text"]) for part in value)
    return value.strip() in text or "".join(value.split()) in "".join(text.split())


def _with_probes(value: Any) -> Any:
    """A content, or tool calls, with a probe at the start and one at the end."""
    one, two = _PROBES
    if isinstance(value, str):
        return re.sub(r"^(\s*<think>\s*)?", rf"\1{one}", value, count=1) + two
    if "text" in value[0]:
        return [{"type": "text", "text": one}, *value, {"type": "text", "text": two}]
    changed = function_of(value[-1]) | {"name": one, "arguments": {two: two}}
    return [*value[:-1], value[-1] | {"function": changed} if "function" in value[-1] else changed]
