"""Field types: each field of a configuration declares its type and constraint; `problems` checks them all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jlora import LoraConfig
from jlora.fields import expected, fits
from jlora.messages import shown


class ConfigError(ValueError):
    """An unusable configuration; the message states the reason and what to pass instead."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A condition on a value besides its type; the second argument of `Annotated`.

    Attributes:
      words: type and constraint, worded for error messages.
      holds: whether a value of the right type satisfies the constraint.
      example: a valid value, as on the command line, for fields without a default.
    """

    words: str
    holds: Callable[[Any], bool]
    example: str = ""


def at_least(least: int, example: int | None = None) -> Constraint:
    """Whole numbers from ``least``."""
    return Constraint(f"a whole number >= {least}", lambda x: x >= least, str(least if example is None else example))


Count = Annotated[int, at_least(1)]
Positive = Annotated[float, Constraint("a number > 0", lambda x: x > 0)]
NotNegative = Annotated[float, Constraint("a number >= 0", lambda x: x >= 0)]
Fraction = Annotated[float, Constraint("a fraction, 0 <= x < 1", lambda x: 0 <= x < 1, "0.1")]
Seed = Annotated[int, at_least(0)]
Source = Annotated[str, Constraint("a file, a folder or the name of a dataset", bool, "train.jsonl")]
Column = Annotated[str, Constraint("the name of a column", bool, "text")]


class Part:
    """A part of a configuration: a dataclass whose fields declare their allowed values."""

    def conflicts(self) -> Iterator[str]:
        """Conflicts between fields of the right types; each line begins with a field's name."""
        yield from ()


def problems(part: Part, prefix: str = "") -> Iterator[str]:
    """All problems of a configuration: in its fields, in its parts, and between fields."""
    typed = True
    for name, value, default, hint in _fields(part):
        if not fits(value, hint):
            yield _problem(prefix + name, value, default, hint)
            typed = typed and fits(value, _bare(hint))
        for below, one in value.items() if isinstance(value, Mapping) else (("", value),):
            if isinstance(one, Part):
                yield from problems(one, f"{prefix}{name}.{below}." if below else f"{prefix}{name}.")
    if typed:
        yield from (prefix + conflict for conflict in part.conflicts())


def misplaced_parts(part: Part) -> list[str]:
    """The problems of fields that should hold a part of the configuration, but hold something else."""
    return [_problem(*field) for field in _fields(part) if _parts(field[-1]) and not fits(field[1], field[-1])]


def refuse(found: Iterable[str]) -> None:
    """Raises a ConfigError that lists the problems, if there are any."""
    if found := list(found):
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError("\n  ".join([f"{count} in the configuration:", *found]))


def flag(path: str) -> str:
    """The command-line flag of a field."""
    return "--" + path.replace("_", "-")


def _fields(part: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, value, default and declared type of every field."""
    hints = _hints(type(part))
    for field in dataclasses.fields(part):
        yield field.name, getattr(part, field.name), field.default, hints[field.name]


@functools.cache  # a sweep checks thousands of configurations
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _problem(path: str, value: Any, default: Any, hint: Any) -> str:
    got = str(value) if isinstance(value, Path) else shown(value)
    words = " or ".join(_words(option) for option in _options(hint))
    words += ", or None" if NoneType in get_args(_bare(hint)) else ""
    if parts := _parts(hint):
        advice = f"write {path} = {parts[0]}(...)"
    else:
        examples = [one.example for option in _options(hint) for one in get_args(option) if isinstance(one, Constraint)]
        choices = (str(get_args(option)[0]) for option in _options(hint) if get_origin(option) is Literal)
        plain = str(default) if isinstance(default, int | float | str) and not isinstance(default, bool) else ""
        if default == 0 and any(examples):  # which switches the field off
            plain = ""
        advice = f"pass {flag(path)} {plain or next((one for one in (*examples, *choices) if one), '')}".rstrip()
    return f"{path}: got {got}, expected {words}; {advice}"


def _words(option: Any) -> str:
    constraint = next((one for one in get_args(option)[1:] if isinstance(one, Constraint)), None)
    if constraint is not None:
        return constraint.words
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    return expected(option)


def _bare(hint: Any) -> Any:
    """A type without its constraint; inner ones do not matter here."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_bare(option) for option in get_args(hint))]  # noqa: UP007
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _options(hint: Any) -> list[Any]:
    """The types of a union except None, or the single type."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [option for option in options if option is not NoneType]


def _parts(hint: Any) -> list[str]:
    """The names of the dataclasses that a field may hold."""
    return [one.__name__ for one in _options(hint) if isinstance(one, type) and issubclass(one, Part | LoraConfig)]
