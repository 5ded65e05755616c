"""A row's values in, checked messages and tools for a chat template out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from train.config import ConfigError

Message: TypeAlias = dict[str, Any]


def messages_of(raw: Any) -> list[Message]:
    """The messages of a conversation, from a list of messages or its JSON.

    Drops keys without a value, since tables have every key in every row. A content of one text part becomes that
    text, and JSON arguments of tool calls become objects. The template handles everything else.

    Raises:
      ConfigError: with the first malformed message.
    """
    messages = _without_none(_from_json(raw))
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f'got {raw!r:.200}, expected a list of one or more {{"role": "user", "content": "..."}}')
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def tools_of(raw: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, from a list of JSON schemas or its JSON; None if there are none.

    Raises:
      ConfigError: for anything else.
    """
    tools = _without_none(_from_json(raw))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"got {raw!r:.200}, expected a list of JSON schemas of tools, or the JSON of one")
    return tools


def function_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """The function of a tool or a tool call: nested below ``function``, or the call itself."""
    inner = call.get("function")
    return dict(inner if isinstance(inner, Mapping) else call)


def _checked_message(i: int, message: Message) -> Message:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or not role:
        raise ConfigError(f"message {i} has the keys {', '.join(message)}; expected a role and a content")
    # A message with tool calls needs no content, but most templates read it.
    found = {"content": ""} | {key: value for key, value in message.items() if value != [] or key == "content"}
    if isinstance(content, list):
        found["content"] = _checked_parts(i, content)
    elif content is None and not calls or not isinstance(content, str | None):
        raise ConfigError(
            f"message {i}, {role!r}, has the content {content!r:.120}; expected a string, or a list of "
            '{"type": "text", "text": "..."}'
        )
    if calls:
        found["tool_calls"] = _checked_calls(i, calls)
    return found


def _checked_parts(i: int, content: list[Any]) -> str | list[dict[str, str]]:
    """A single-part content as its text, else a list of text parts."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ConfigError(f"message {i} has a part of type {kind!r}; expected text only: remove these parts")
    return parts[0]["text"] if len(parts) == 1 else parts if parts else ""


def _checked_calls(i: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in function_of(call) for call in calls):
        raise ConfigError(
            f'message {i} has the tool_calls {calls!r:.120}; expected a list of {{"type": "function", "function": '
            '{"name": "...", "arguments": {...}}}'
        )
    found = []
    for call in calls:
        function = function_of(call)
        function["arguments"] = _from_json(function.get("arguments", {}))
        if not isinstance(function["arguments"], dict):
            raise ConfigError(
                f"message {i} calls {function['name']!r} with {function['arguments']!r:.120}; expected a JSON object"
            )
        found.append(call | {"function": function} if "function" in call else function)
    return found


def _from_json(value: Any) -> Any:
    """The value of a JSON text; anything else unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _without_none(value: Any) -> Any:
    """Nested lists and dictionaries without keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list | tuple) else value
