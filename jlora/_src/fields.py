"""Values from a file against the types that are declared for them.

A declaration is a type hint, where need be with a range: ``int | None``, ``Annotated[float, Within(0, 1)]``. Numbers
are finite, and no boolean is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

FLOAT32 = 3.4028234663852886e38
"""The largest number that every dtype of eight exponent bits has."""


@dataclasses.dataclass(frozen=True)
class Within:
    """Numbers from ``least`` to ``most``; with ``above``, greater than ``least``."""

    least: float
    most: float = FLOAT32
    above: bool = False

    def holds(self, value: Any) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        least = f"above {self.least}" if self.above else f"from {self.least}"
        return least if self.most == FLOAT32 else f"{least} to {self.most}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Names that there are."""

    names: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


def faults(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """A line for each of the values that is not of its declared type: its name, what was got and what is expected."""
    return [
        f"{name} = {shown(value)}; expected {expected(hints[name])}"
        for name, value in values.items()
        if name in hints and not fits(value, hints[name])
    ]


def shown(value: Any) -> str:
    """A value as an error shows it; the repr of a huge number is itself an error in Python."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:117]}..."


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, of JSON or of Python, is of the declared type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return fits(value, args[0]) and all(one.holds(value) for one in args[1:])
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and _all_fit(value, args[0])
    if origin is dict:
        return isinstance(value, Mapping) and _all_fit(value, args[0]) and _all_fit(value.values(), args[1])
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return type(value) in (int, float) and -FLOAT32 <= value <= FLOAT32
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def expected(hint: Any) -> str:
    """The declared type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return str(args[1]) if isinstance(args[1], OneOf) else f"{expected(args[0])} {args[1]}"
    if origin in (Union, UnionType):
        return " or ".join(map(expected, args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (tuple, list):
        return f"a list, each {expected(args[0])}"
    if origin is dict:
        return f"an object, each {expected(args[1])}" if args[1] is not Any else "an object"
    if hint in _WORDS:
        return _WORDS[hint]
    return f"a {hint.__name__}"


def _all_fit(values: Iterable[Any], hint: Any) -> bool:
    return all(fits(one, hint) for one in values)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    None: "null",
    NoneType: "null",
    Path: "a path",
}
