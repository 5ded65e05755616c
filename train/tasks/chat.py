"""Conversations in a chat template: what of the text is the assistant's.

A turn of the assistant is learnt in the text in which it is generated: the conversation up to it, in which what follows
the generation prompt is the turn. Most templates show a turn the same way when the conversation goes on, so that one
text has all turns. A template that does not (earlier thinking is left out, tools move to the last question) gives
another text where that happens.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError

from train.config import ConfigError
from train.tasks.marked import Marked

Message: TypeAlias = dict[str, Any]

OWN_TEMPLATE = "pass a --task.template that shows it (Jinja, or a file with it)"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # no text has these: Unicode keeps them for the inside of programs
_PROBES = ("jloraOne", "jloraTwo")


class Chat:
    """A tokenizer's chat template.

    Args:
      tokenizer: has a chat template.
      system: the system message of conversations that have none, or None for none.

    All methods raise a ConfigError without the place of the conversation, which the caller knows.
    """

    def __init__(self, tokenizer: Any, system: str | None = None):
        self._tokenizer, self._system = tokenizer, system
        self._special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._shown: set[tuple[str, str]] = set()

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Marked]:
        """Texts that have all turns of the assistant between them, each marked once; none without a turn.

        Args:
          messages, tools: as `messages_of` and `tools_of` return them.
        """
        messages, found, seen = self._complete(messages), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self._turn(messages[: i + 1], tools)
            self._check_shown(messages[: i + 1], seen, turn, tools)
            seen = i + 1
            if found and turn.text.startswith(found[-1].text):
                turn = Marked(turn.text, [*found.pop().spans, *turn.spans])
            found.append(turn)
        return found

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Marked:
        """A conversation as the template shows it, all of it marked."""
        messages = self._complete(messages)
        text = self._render(messages, tools)
        marked = Marked(text, [(0, len(text))])
        self._check_shown(messages, 0, marked, tools, thoughts=False)
        return marked

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text after which the assistant's next turn is generated."""
        return self._render(self._complete(messages), tools, prompt=True)

    def unread(self, messages: Sequence[Message]) -> set[str]:
        """Keys of messages whose names the template does not hold, so that it cannot read them."""
        source = self._source(None)
        keys = {key for one in messages for key in one}.difference(_REASONING)  # one is read by the others' names
        return {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", source)}

    @functools.cached_property
    def end(self) -> str | None:
        """The special token with which a turn of the assistant ends, or None."""
        try:
            text, spans = self._turn([_said("user", _PROBES[0]), _said("assistant", _PROBES[1])], None)
        except ConfigError:
            return None
        return next((token for token in self._special if spans and text[: spans[-1][1]].endswith(token)), None)

    def _complete(self, messages: Sequence[Message]) -> list[Message]:
        start = [] if self._system is None or messages[0]["role"] == "system" else [_said("system", self._system)]
        return [*start, *(message | self._content(message) for message in messages)]

    def _content(self, message: Message) -> Message:
        """The parts of a content in several parts, as vLLM and llama.cpp give them to a template that takes strings."""
        parts = message.get("content")
        if not isinstance(parts, list) or self._takes_parts:
            return {}
        return {"content": "\n".join(part["text"] for part in parts)}

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows a list of texts as it shows a text."""
        text, parts = _PROBES[0], [{"type": "text", "text": _PROBES[0]}]
        try:
            return len({self._render([_said("user", content)], None) for content in (text, parts)}) == 1
        except ConfigError:
            return False

    # A turn

    def _turn(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Marked:
        """A conversation that ends with a turn of the assistant, and what of it that turn is."""
        text = self._render(messages, tools)
        if _marks(self._source(tools)):
            # Earlier turns are marked too, in the conversation without the last one.
            earlier = messages[:-1] if any(one["role"] == "assistant" for one in messages[:-1]) else []
            before = self._marked(earlier, tools).spans if earlier else []
            marked = self._marked(messages, tools)
            if marked.text != text:
                raise ConfigError(
                    "the chat template changes the text between {% generation %} and {% endgeneration %} after these "
                    "marks, so that it cannot be found. Pass a --task.template that marks text as it writes it"
                )
            return Marked(text, marked.spans[len(before) :])
        before = self._before(messages, tools)
        if not text.startswith(before):
            text = self._following(before, messages, text, tools)
        # A turn ends with its end token, after which nothing is generated; templates often begin a new line there.
        closed = text.rstrip()
        return Marked(text, [(len(before), len(closed) if closed.endswith(self._special) else len(text))])

    def _following(self, before: str, messages: Sequence[Message], text: str, tools: Sequence[Any] | None) -> str:
        """The prompt ``before`` and what follows it, where ``text`` shows what is earlier in it otherwise.

        Both have the message before the turn, and the generation prompt behind it. (Mistral's template shows the system
        message in front of a question that is the last message, and no longer when it is answered.)
        """
        *earlier, turn = messages
        asked = earlier[-1].get("content") if earlier else None
        if isinstance(asked, str) and (asked := asked.strip()) in before:
            end = before[before.rindex(asked) :]
            # Sought where the answer is another: it may repeat the question.
            at = self._render([*earlier, turn | {"content": _PROBES[0]}], tools).rfind(end)
            if at >= 0 and text[at:].startswith(end):
                return before + text[at + len(end) :]
        shared = len(os.path.commonprefix([text, before]))
        raise ConfigError(
            f"the chat template's generation prompt ends in {before[shared:][:80]!r} where its text of the assistant's "
            f"message goes on with {text[shared:][:80]!r}, so that no answer is generated as it is learnt. Pass a "
            "--task.template whose turns begin with its generation prompt, or which marks them with {% generation %} "
            "and {% endgeneration %}; or --task.learn-prompt, which learns the text whole"
        )

    def _before(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The text after which the last message is generated."""
        *earlier, turn = messages
        if earlier:
            try:
                return self._render(earlier, tools, prompt=True)
            except ConfigError:  # some templates show no conversation without a question
                pass
        # What any answer would begin with, up to the generation prompt.
        texts = [self._render([*earlier, turn | {"content": probe}], tools) for probe in ("a", "b")]
        begin, opening = os.path.commonprefix(texts), self._opening
        return begin[: begin.rindex(opening) + len(opening)] if opening and opening in begin else begin.rstrip()

    @functools.cached_property
    def _opening(self) -> str:
        """The generation prompt alone."""
        question = [_said("user", _PROBES[0])]
        try:
            return self._render(question, None, prompt=True).removeprefix(self._render(question, None))
        except ConfigError:
            return ""

    # The template

    def _source(self, tools: Sequence[Any] | None) -> str:
        try:
            return self._tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, none of which is the default
            raise ConfigError(f"{str(error).splitlines()[0]} Or pass --task.template") from error

    def _marked(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Marked:
        """The text, and what the template marks in it."""
        # Characters tell where marks are, wherever the template puts the marked text together (in a macro, too). The
        # `if` has the whitespace control of the tag: that of one next to which the character is written would miss.
        source = re.sub(
            r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}",
            lambda tag: (
                f"{{%{tag[1]} endif %}}{{{{ '{_CLOSE}' }}}}{{% endgeneration {tag[3]}%}}"
                if tag[2]
                else f"{{%{tag[1]} generation %}}{{{{ '{_OPEN}' }}}}{{% if true {tag[3]}%}}"
            ),
            self._source(tools),
        )
        text, spans = "", []
        for part in re.split(f"([{_OPEN}{_CLOSE}])", self._render(messages, tools, source=source)):
            if part == _OPEN:
                spans.append((len(text), len(text)))
            elif part == _CLOSE:
                spans[-1] = (spans[-1][0], len(text))
            else:
                text += part
        return Marked(text, spans)

    def _render(
        self, messages: Sequence[Message], tools: Any, *, prompt: bool = False, source: str | None = None
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"the chat template cannot show messages of {roles}: {type(error).__name__}: {error}. Change the "
                "messages, or pass another --task.template"
            ) from error

    # What the template leaves out

    def _check_shown(
        self, messages: Sequence[Message], since: int, turn: Marked, tools: Any, *, thoughts: bool = True
    ) -> None:
        """Raises a ConfigError if the template leaves out a part of the messages from ``since`` on, or the tools.

        Without ``thoughts`` it may leave those of the assistant out, as many do when a conversation goes on.
        """
        for i, message in enumerate(messages[since:], since):
            own = turn.text[turn.spans[0][0] :] if message["role"] == "assistant" and turn.spans else turn.text
            for key in ("content", "tool_calls", *(_REASONING if thoughts else ())):
                value = message.get(key)
                if not value or ((message["role"], key) in self._shown and _holds(own, value)):
                    continue
                probed = [*messages[:i], message | {key: _probed(value)}, *messages[i + 1 :]]
                text = self._turn(probed, tools).text if thoughts else self._render(probed, tools)
                if not all(probe in text for probe in _PROBES[0 if thoughts else 1 :]):
                    raise ConfigError(
                        f"the chat template leaves out the {key!r} of message {i}, {message['role']!r}, or a part of "
                        f"it: {value!r:.120}. Take it out of the data, or {OWN_TEMPLATE}"
                    )
                self._shown.add((message["role"], key))
        for tool in tools or ():
            if (name := _function(tool).get("name")) and str(name) not in turn.text:
                raise ConfigError(f"the chat template leaves out the tool {name!r}; take it out, or {OWN_TEMPLATE}")


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _marks(source: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


def _holds(text: str, value: Any) -> bool:
    """Whether a text has a value in it, but for spaces; what calls are written like differs, so they are not sought."""
    if isinstance(value, list):
        return all(isinstance(part, dict) and "text" in part and _holds(text, part["text"]) for part in value)
    return value.strip() in text or "".join(value.split()) in "".join(text.split())


def _probed(value: Any) -> Any:
    """A content, or calls, that can be recognized at its start and at its end."""
    one, two = _PROBES
    if isinstance(value, str):
        return re.sub(r"^(\s*<think>\s*)?", rf"\1{one}", value, count=1) + two
    if "text" in value[0]:
        return [{"type": "text", "text": one}, *value, {"type": "text", "text": two}]
    changed = _function(value[-1]) | {"name": one, "arguments": {two: two}}
    return [*value[:-1], value[-1] | {"function": changed} if "function" in value[-1] else changed]


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    return dict(inner if isinstance(inner, Mapping) else call)


# What the data hold


def messages_of(raw: Any) -> list[Message]:
    """A conversation as templates take it, from what a file holds (a list of messages, or the JSON of one).

    Keys without a value are dropped, since tables have every key in every row; a content of one text is that text;
    arguments of calls are objects, also where they are stored as JSON. All else is the template's.

    Raises:
      ConfigError: naming the first message that is none.
    """
    messages = _plain(_parsed(raw))
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f'got {raw!r:.200}, expected a list of one or more {{"role": "user", "content": "..."}}')
    return [_message(i, message) for i, message in enumerate(messages)]


def tools_of(raw: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of their JSON schemas, or the JSON of one; None for none.

    Raises:
      ConfigError: if they are something else.
    """
    tools = _plain(_parsed(raw))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"got {raw!r:.200}, expected a list of JSON schemas of tools, or the JSON of one")
    return tools


def _message(i: int, message: Message) -> Message:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"message {i} has the keys {', '.join(message)}; expected a role and a content")
    # Whoever calls a tool need not say a thing, and most templates want a text.
    found = {"content": ""} | {key: value for key, value in message.items() if value != [] or key == "content"}
    if isinstance(content, list):
        found["content"] = _text(i, content)
    elif content is None and not calls or not isinstance(content, str | None):
        raise ConfigError(
            f"message {i}, {role!r}, has the content {content!r:.120}; expected a text, or a list of "
            '{"type": "text", "text": "..."}'
        )
    if calls:
        found["tool_calls"] = _calls(i, calls)
    return found


def _text(i: int, content: list[Any]) -> str | list[dict[str, str]]:
    """One text, or several as parts."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ConfigError(f"message {i} has a part of type {kind!r}; expected text alone: take these parts out")
    return parts[0]["text"] if len(parts) == 1 else parts if parts else ""


def _calls(i: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in _function(call) for call in calls):
        raise ConfigError(
            f'message {i} has the tool_calls {calls!r:.120}; expected a list of {{"type": "function", "function": '
            '{"name": "...", "arguments": {...}}}'
        )
    found = []
    for call in calls:
        function = _function(call)
        function["arguments"] = _parsed(function.get("arguments", {}))
        if not isinstance(function["arguments"], dict):
            raise ConfigError(
                f"message {i} calls {function['name']!r} with {function['arguments']!r:.120}; expected a JSON object"
            )
        found.append(call | {"function": function} if "function" in call else function)
    return found


def _parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """Lists and dictionaries without the keys that have no value."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
