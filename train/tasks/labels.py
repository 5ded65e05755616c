"""Labels: from what a column holds to the names of classes, to their numbers, counts and weights."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jlora._src.paths import nearest
from jlora._src.table import table as text_table
from train.config import ConfigError
from train.data.tables import Table, column

NO_LABEL = "-1"
"""What datasets of the hub hold where there is no label, such as in the test split of a benchmark."""

Weights = Literal["balanced"] | Mapping[str, float] | None
"""What `train.config.SequenceClassification.class_weights` may be."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_SHOWN = 20


def class_names(table: Table, label: str) -> tuple[str, ...]:
    """The names of the classes: as the data declares them, or the different labels of the column.

    Numbers come first, by their value, then names.

    Raises:
      ConfigError: if a value is no label; if the labels are scores; if there are fewer than two; or if there are nearly
        as many as rows.
    """
    words = label_words(table, label)
    declared = _declared(table, label)
    _refuse_no_label(table, words, declared, label)
    names = declared or sorted(set(words), key=_order)
    here = f"task.label: the column {label!r} holds"
    if not declared and all(map(_is_number, names)) and not all(float(name).is_integer() for name in names):
        scores = [row for row, word in enumerate(words) if not float(word).is_integer()]
        raise ConfigError(
            f"{here} numbers that are not whole: {_told(table, words, scores)}. A number is learnt with "
            f"--task.regression, of texts; where these are names of classes, pass {_flag(names)}"
        )
    if len(names) < 2:
        raise ConfigError(
            f"{here} {names[0]!r} alone; expected two classes or more. Pass another --task.label, or all classes: "
            f"--task.labels {shlex.quote(names[0])} OTHER"
        )
    if not declared and len(names) > max(_SHOWN, len(words) // 2):
        others = ", ".join(name for name in table.column_names if name != label)
        raise ConfigError(
            f"{here} {len(names):,} different labels in {len(words):,} rows, such as {', '.join(names[:3])}: too few "
            f"examples of each, as in a column of ids. Pass --task.label and one of {others}; or, where these are "
            "classes, all of them with --task.labels"
        )
    return tuple(names)


def class_numbers(table: Table, label: str, names: Sequence[str]) -> np.ndarray:
    """The class of every label of a column, int32 [n], as its place in ``names``.

    A label is a class by its name. Where the column holds no name, and no name is itself a number, whole numbers are
    the classes' places, from 0.

    Raises:
      ConfigError: naming every label that is no class, and its rows.
    """
    words = label_words(table, label)
    _refuse_no_label(table, words, names, label)
    places = {name: i for i, name in enumerate(names)}
    may_be_numbers = not any(map(_is_number, names)) and not any(word in places for word in words)
    are_numbers = may_be_numbers and all(word.isascii() and word.isdecimal() for word in words)
    if are_numbers:
        places = {str(i): i for i in range(len(names))}
    if wrong := [row for row, word in enumerate(words) if word not in places]:
        unknown = sorted({words[row] for row in wrong}, key=_order)
        known = f"{_some(names)}{f', or its number from 0 to {len(names) - 1}' if may_be_numbers else ''}"
        way = "give --task.labels one name for each number" if are_numbers else f"pass {_flag([*names, *unknown])}"
        raise ConfigError(
            f"task.label: the column {label!r} holds {_told(table, words, wrong)}, which is no class"
            f"{nearest(unknown[0], names)}; expected one of {known}. Take these rows out, or {way}"
        )
    return np.asarray([places[word] for word in words], np.int32)


def label_words(table: Table, label: str) -> list[str]:
    """Each label of a column as text: a string as it is, a declared class by its name, true and false as JSON has them,
    and a number as Python writes it, without a point where it is whole.

    Raises:
      ConfigError: naming every value that is no label, such as a list or an empty text, and its rows.
    """
    values = column(table, label, "task.label")
    if wrong := [row for row, value in enumerate(values) if not _is_label(value)]:
        raise ConfigError(
            f"task.label: the column {label!r} holds {_told(table, values, wrong)}; expected a name or a "
            "number. Take these rows out, or pass another --task.label"
        )
    declared = _declared(table, label)
    return [_word(value, declared) for value in values]


def targets(table: Table, label: str) -> np.ndarray:
    """The numbers that a regression learns, float32 [n].

    Raises:
      ConfigError: naming every value that is no finite number, and its rows.
    """
    values = column(table, label, "task.label")
    with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
        numbers = np.asarray([_target(value) for value in values], np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(numbers))).size:
        raise ConfigError(
            f"task.label: the column {label!r} holds {_told(table, values, wrong.tolist())}; a regression needs finite "
            "numbers. Take these rows out, or pass another --task.label"
        )
    return numbers


def counts(numbers: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """How many of the ``numbers`` of classes, int [n], are of each name."""
    return dict(zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True))


def class_weights(wanted: Weights, count: Mapping[str, int]) -> dict[str, float] | None:
    """The weight of each class in the loss.

    ``balanced`` is scikit-learn's: n / (classes * examples of the class), so that all classes weigh the same together
    and an example 1 on average (King and Zeng 2001).

    Args:
      wanted: see `train.config.SequenceClassification`.
      count: the training examples of each class.

    Raises:
      ConfigError: if the names are not those of the classes, or a class to be balanced has no example.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        if absent := [name for name, n in count.items() if not n]:
            raise ConfigError(
                f"task.class_weights: no train example has the label {_some(list(map(repr, absent)))}, so that it has "
                "no balanced weight; take it out of --task.labels, or give each weight: "
                f"{_weights_flag(dict.fromkeys(count, 1.0))}"
            )
        return {name: sum(count.values()) / (len(count) * n) for name, n in count.items()}
    assert not isinstance(wanted, str)
    if set(wanted) != set(count):
        wrong = [f"{name!r} is no class{nearest(name, count)}" for name in wanted if name not in count]
        wrong += [f"{name!r} has no weight" for name in count if name not in wanted]
        raise ConfigError(
            f"task.class_weights: {'; '.join(wrong)}; expected a weight for each class: "
            f"{_weights_flag({name: wanted.get(name, 1.0) for name in count})}"
        )
    return {name: float(wanted[name]) for name in count}


def weight_vector(weights: Weights, names: Sequence[str]) -> np.ndarray | None:
    """The weights that `class_weights` gave, in the order of the classes, float32 [classes]."""
    if weights is None or not names:
        return None
    assert not isinstance(weights, str), "resolved by `train.tasks.registry.resolved`"
    return np.asarray([weights[name] for name in names], np.float32)


def counts_table(sets: Mapping[str, Mapping[str, int]], weights: Mapping[str, float] | None = None) -> str:
    """The `counts` of several sets as text, a line for each label; of very many labels the commonest and the rarest."""
    first = next(iter(sets.values()))
    names = list(first)
    rows = {name: [name, *(f"{one[name]:,}" for one in sets.values())] for name in names}
    if weights is not None:
        rows = {name: [*row, f"{weights[name]:.4g}"] for name, row in rows.items()}
    if len(names) > _SHOWN:
        names.sort(key=lambda name: -first[name])
        between = [f"({len(names) - _SHOWN:,} more)", *([""] * (len(rows[names[0]]) - 1))]
        half = _SHOWN // 2
        lines = [*(rows[name] for name in names[:half]), between, *(rows[name] for name in names[-half:])]
    else:
        lines = list(rows.values())
    heads = ["label", *sets, *(() if weights is None else ("weight",))]
    return text_table(heads, lines, right=range(1, len(heads)))


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) or isinstance(value, float) and math.isfinite(value)


def _word(value: Any, declared: Sequence[str]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and 0 <= value < len(declared):
        return declared[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _target(value: Any) -> float:
    if isinstance(value, str):
        return float(value) if _is_number(value) else math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _declared(table: Table, label: str) -> list[str]:
    return list(getattr(table.features.get(label), "names", None) or ())


def _refuse_no_label(table: Table, words: Sequence[str], names: Sequence[str], label: str) -> None:
    """Raises a ConfigError if there are rows without a label, unless what says so is a class."""
    if NO_LABEL in names or not (rows := [row for row, word in enumerate(words) if word == NO_LABEL]):
        return
    which = f"all {len(rows)} rows" if len(rows) == len(words) else table.locate(rows)
    both = sorted({*names, *words}, key=_order)
    right = f"; where -1 is a class, name all: {_flag(both)}" if all(map(_is_number, both)) else ""
    raise ConfigError(
        f"task.label: the column {label!r} holds -1 in {which}, which stands for no label, as in test splits of "
        f"the hub. Take these rows out, or pass another split{right}"
    )


def _is_number(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None


def _order(word: str) -> tuple[bool, float, str]:
    return (False, float(word), word) if _is_number(word) else (True, 0.0, word)


def _told(table: Table, values: Sequence[Any], rows: Sequence[int]) -> str:
    """The values in some rows, each with its rows: ``'a' (row 3), 'b' (rows 5 and 7)``; of many the first."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(f"{values[row]!r:.60}", []).append(row)
    more = f" and {len(found) - 8:,} more" if len(found) > 8 else ""
    return ", ".join(f"{value} ({table.locate(of)})" for value, of in [*found.items()][:8]) + more


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _flag(names: Sequence[str]) -> str:
    return "--task.labels " + (shlex.join(names) if len(names) <= _SHOWN else "NAME NAME ...")


def _weights_flag(weights: Mapping[str, float]) -> str:
    pairs = [part for name, weight in weights.items() for part in (name, f"{weight:g}")]
    return "--task.class-weights " + (shlex.join(pairs) if len(weights) <= _SHOWN else "NAME WEIGHT NAME WEIGHT ...")
