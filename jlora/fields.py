"""Checks fields from a file or a user against their type hints.

A hint may carry a range or a set of names: ``int | None``, ``Annotated[float, Within(0, 1)]``. Numbers must be finite,
and a boolean is not a number.

>>> faults({"rank": 0}, {"rank": Annotated[int, Within(0, above=True)]})
['rank = 0; expected an integer above 0']
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jlora.messages import shown

__all__ = ["FLOAT32", "OneOf", "Within", "bad_pattern", "expected", "faults", "fits"]

FLOAT32 = 3.4028234663852886e38
"""The largest finite float32: a bound for every dtype with eight exponent bits."""


@dataclasses.dataclass(frozen=True)
class Within:
    """A range of numbers, ``least`` to ``most``; ``above`` excludes ``least``, ``below`` excludes ``most``."""

    least: float
    most: float = FLOAT32
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        return (self.least < value if self.above else self.least <= value) and (
            value < self.most if self.below else value <= self.most
        )

    def __str__(self) -> str:
        least = f"above {self.least}" if self.above else f"from {self.least}"
        return least if self.most == FLOAT32 else f"{least} to {'below ' if self.below else ''}{self.most}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of these names."""

    names: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


def faults(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """A line for each value that does not fit its hint: ``name = value; expected ...``. Skips unhinted values."""
    return [
        f"{name} = {shown(value)}; expected {expected(hints[name])}"
        for name, value in values.items()
        if name in hints and not fits(value, hints[name])
    ]


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` fits the type hint; a JSON list fits a tuple, and an integer fits a float."""
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
    """The type hint in words, as in ``a number from 0 to 1 or null``."""
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


def bad_pattern(pattern: Any) -> str | None:
    """Why ``pattern`` is not a regular expression; None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        return f"{pattern!r} is not a regular expression ({error})"
    return None


def _all_fit(values: Iterable[Any], hint: Any) -> bool:
    return all(fits(one, hint) for one in values)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    None: "null",
    NoneType: "null",
    Path: "a path",
}
