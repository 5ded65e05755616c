"""A column of labels in, class names, class numbers, counts and weights out; or the targets of a regression."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jlora.messages import nearest
from jlora.messages import table as text_table
from train.config import ConfigError
from train.data.tables import Distinct, Table, column, distinct
from train.messages import listed

NO_LABEL = "-1"
"""Datasets on the hub use this for a missing label, as in test splits of benchmarks."""

ClassWeights = Literal["balanced"] | Mapping[str, float] | None
"""The type of `train.config.SequenceClassification.class_weights`."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_SHOWN = 20


def class_names(table: Table, label: str) -> tuple[str, ...]:
    """The names of the classes: declared by the data, or the distinct labels of the column.

    Sorted: numbers first, by value, then other names.

    Raises:
      ConfigError: if a value cannot be a label; if the labels are scores; or if there are fewer than two classes, or
        nearly as many as rows.
    """
    texts = label_texts(table, label)
    declared = _declared_classes(table, label)
    _check_no_missing_label(table, texts, declared, label)
    names = declared or sorted(set(texts.values), key=_sort_key)
    here = f"task.label: the column {label!r} holds"
    if not declared and all(map(_is_number, names)) and not all(float(name).is_integer() for name in names):
        scores = texts.rows(lambda text: not float(text).is_integer())
        raise ConfigError(
            f"{here} numbers that are not whole: {_values_by_row(table, texts, scores)}. To predict a number from a "
            f"text, pass --task.regression; if these are names of classes, pass {_labels_flag(names)}"
        )
    if len(names) < 2:
        raise ConfigError(
            f"{here} {names[0]!r} alone; expected two classes or more. Pass another --task.label, or all classes: "
            f"--task.labels {shlex.quote(names[0])} OTHER"
        )
    if not declared and len(names) > max(_SHOWN, len(texts) // 2):
        others = ", ".join(name for name in table.column_names if name != label)
        raise ConfigError(
            f"{here} {len(names):,} different labels in {len(texts):,} rows, such as {', '.join(names[:3])}: too few "
            f"examples of each, as in a column of ids. Pass --task.label and one of {others}; or, if these are "
            "classes, pass all of them with --task.labels"
        )
    return tuple(names)


def class_numbers(table: Table, label: str, names: Sequence[str]) -> np.ndarray:
    """The class of each label of a column, int32 [n]: its index in ``names``.

    A label names its class. If the column has none of the names, and no name is a number, whole numbers are
    indices of the classes.

    Raises:
      ConfigError: listing every label that is not a class, with its rows.
    """
    texts = label_texts(table, label)
    _check_no_missing_label(table, texts, names, label)
    index = {name: i for i, name in enumerate(names)}
    may_be_numbers = not any(map(_is_number, names)) and not any(text in index for text in texts.values)
    are_numbers = may_be_numbers and all(text.isascii() and text.isdecimal() for text in texts.values)
    if are_numbers:
        index = {str(i): i for i in range(len(names))}
    if wrong := texts.rows(lambda text: text not in index):
        unknown = sorted(set(texts.values) - set(index), key=_sort_key)
        known = f"{listed(names, _SHOWN)}{f', or its number from 0 to {len(names) - 1}' if may_be_numbers else ''}"
        if are_numbers:
            way = "give --task.labels a name for each number"
        elif not any(text in index for text in texts.values):  # the names of another task
            way = f"pass --task.labels None to take the classes from the data, or {_labels_flag([*names, *unknown])}"
        else:
            way = f"pass {_labels_flag([*names, *unknown])}"
        raise ConfigError(
            f"task.label: the column {label!r} holds {_values_by_row(table, texts, wrong)}, which is not a class"
            f"{nearest(unknown[0], names)}; expected one of {known}. Remove these rows, or {way}"
        )
    return np.asarray([index[text] for text in texts.values], np.int32)[texts.numbers]


def label_texts(table: Table, label: str) -> Distinct:
    """Each label of a column as text: a string unchanged, a declared class by name, booleans as in JSON, and numbers as
    in Python, whole ones without a decimal point.

    Raises:
      ConfigError: listing every value that cannot be a label, such as a list or an empty string, with its rows.
    """
    values = distinct(table, label, "task.label")
    if wrong := values.rows(lambda value: not _is_label(value)):
        raise ConfigError(
            f"task.label: the column {label!r} holds {_values_by_row(table, values, wrong)}; expected a name or a "
            "number. Remove these rows, or pass another --task.label"
        )
    declared = _declared_classes(table, label)
    return values.map(lambda value: _label_text(value, declared))


def regression_targets(table: Table, label: str) -> np.ndarray:
    """The labels of a regression, float32 [n].

    Raises:
      ConfigError: listing every value that is not a finite number, with its rows.
    """
    values = column(table, label, "task.label")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which is an error
        numbers = np.fromiter(map(_target, values), np.float64, len(values)).astype(np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(numbers))).size:
        raise ConfigError(
            f"task.label: the column {label!r} holds {_values_by_row(table, values, wrong.tolist())}; a regression "
            "needs finite numbers. Remove these rows, or pass another --task.label"
        )
    return numbers


def class_counts(numbers: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """The number of examples of each class, from class numbers, int [n]."""
    return dict(zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True))


def class_weights(wanted: ClassWeights, count: Mapping[str, int]) -> dict[str, float] | None:
    """The weight of each class in the loss.

    ``balanced`` is scikit-learn's n / (classes * examples of the class): all classes have the same total weight, and
    the average example weighs 1 (King and Zeng 2001).

    Args:
      wanted: see `train.config.SequenceClassification`.
      count: the number of training examples of each class.

    Raises:
      ConfigError: if the names differ from the classes', or a class to balance has no examples.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        if absent := [name for name, n in count.items() if not n]:
            raise ConfigError(
                f"task.class_weights: no train example has the label {listed(list(map(repr, absent)), _SHOWN)}, so "
                "its balanced weight is undefined; remove it from --task.labels, or pass every weight: "
                f"{_weights_flag(dict.fromkeys(count, 1.0))}"
            )
        return {name: sum(count.values()) / (len(count) * n) for name, n in count.items()}
    assert not isinstance(wanted, str)
    if set(wanted) != set(count):
        wrong = [f"{name!r} is not a class{nearest(name, count)}" for name in wanted if name not in count]
        wrong += [f"{name!r} has no weight" for name in count if name not in wanted]
        raise ConfigError(
            f"task.class_weights: {'; '.join(wrong)}; expected a weight for each class: "
            f"{_weights_flag({name: wanted.get(name, 1.0) for name in count})}"
        )
    return {name: float(wanted[name]) for name in count}


def weight_vector(weights: ClassWeights, names: Sequence[str]) -> np.ndarray | None:
    """The values of `class_weights` in class order, float32 [classes]; or None."""
    if weights is None or not names:
        return None
    assert not isinstance(weights, str), "resolved by `train.tasks.registry.resolved`"
    return np.asarray([weights[name] for name in names], np.float32)


def counts_table(sets: Mapping[str, Mapping[str, int]], weights: Mapping[str, float] | None = None) -> str:
    """The `class_counts` of several sets as text, one line per label, of many only the extremes.

    A last line names the labels that differ only in case or spaces, which are separate classes.
    """
    first = next(iter(sets.values()))
    names = list(first)
    alike = "; ".join(", ".join(map(repr, same)) for same in _variants(names))
    note = f"\n\nthese labels differ only in case or spaces: {alike}" if alike else ""
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
    return text_table(heads, lines, right=range(1, len(heads))) + note


def _variants(names: Sequence[str]) -> list[list[str]]:
    """The names that differ only in case or spaces, by what they share."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(" ".join(name.split()).casefold(), []).append(name)
    return [same for same in found.values() if len(same) > 1]


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) or isinstance(value, float) and math.isfinite(value)


def _label_text(value: Any, declared: Sequence[str]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and 0 <= value < len(declared):
        return declared[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _target(value: Any) -> float:
    if isinstance(value, str):
        return float(value) if _is_number(value) else math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _declared_classes(table: Table, label: str) -> list[str]:
    return list(getattr(table.features.get(label), "names", None) or ())


def _check_no_missing_label(table: Table, texts: Distinct, names: Sequence[str], label: str) -> None:
    """Raises a ConfigError if rows contain `NO_LABEL`, unless that is a class."""
    if NO_LABEL in names or not (rows := texts.rows(lambda text: text == NO_LABEL)):
        return
    which = f"all {len(rows)} rows" if len(rows) == len(texts) else table.locate(rows)
    both = sorted({*names, *texts.values}, key=_sort_key)
    way = f"; if -1 is a class, name all: {_labels_flag(both)}" if all(map(_is_number, both)) else ""
    raise ConfigError(
        f"task.label: the column {label!r} holds -1 in {which}, which marks a missing label in test splits on the hub. "
        f"Remove these rows, or pass another split{way}"
    )


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _sort_key(text: str) -> tuple[bool, float, str]:
    return (False, float(text), text) if _is_number(text) else (True, 0.0, text)


def _values_by_row(table: Table, values: Sequence[Any], rows: Sequence[int]) -> str:
    """The distinct values in ``rows``, each with its rows: ``'a' (row 3), 'b' (rows 5, 7)``; at most eight."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(f"{values[row]!r:.60}", []).append(row)
    return listed([f"{value} ({table.locate(of)})" for value, of in found.items()], 8)


def _labels_flag(names: Sequence[str]) -> str:
    return "--task.labels " + (shlex.join(names) if len(names) <= _SHOWN else "NAME NAME ...")


def _weights_flag(weights: Mapping[str, float]) -> str:
    pairs = [part for name, weight in weights.items() for part in (name, f"{weight:g}")]
    return "--task.class-weights " + (shlex.join(pairs) if len(weights) <= _SHOWN else "NAME WEIGHT NAME WEIGHT ...")
