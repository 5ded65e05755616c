"""Files of .json and .jsonl in, Arrow tables out: JSON types are kept, and a column of mixed types stays JSON text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa

from train.config import ConfigError
from train.data.lines import File, in_batches


def is_json(file: File) -> bool:
    return file.suffix in (".json", ".jsonl")


def json_tables(
    file: File, types: Mapping[str, pa.DataType | None], features: datasets.Features | None
) -> Iterator[pa.Table]:
    """The rows of a file, with the types declared in `features`, or the ``types`` from `json_types`.

    Raises:
      ConfigError: with file and line or row, if it is not JSON, or its values do not have the declared types.
    """
    for batch in in_batches(row for _, row in _objects(file)):
        if features is None:
            yield pa.table({name: _json_array([row.get(name) for row in batch], kind) for name, kind in types.items()})
            continue
        values = {name: [row.get(name) for row in batch] for name in features}
        try:
            yield datasets.Dataset.from_dict(values, features=features).data.table
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
            raise ConfigError(f"{file.name}: its values do not have the declared types: {error}") from error


def _json_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    if kind is not None:
        return pa.array(values, kind)
    written = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(), written)


def json_types(files: Iterable[File]) -> dict[str, pa.DataType | None]:
    """The type of each column over all files; None for a column that stays JSON text."""
    found: dict[str, set[Any]] = {}
    for file in files:
        for batch in in_batches(row for _, row in _objects(file)):
            for name in dict.fromkeys(name for row in batch for name in row):
                found.setdefault(name, set()).update(_value_types(row.get(name) for row in batch))
    return {name: _arrow_type(types) for name, types in found.items()}


def _value_types(values: Iterable[Any]) -> set[Any]:
    """The names of the values' types; a list becomes the frozenset of its types."""
    values, found = list(values), set()
    for kind in set(map(type, values)):
        if kind is int:
            largest = max(abs(value) for value in values if type(value) is int)
            found.add("int" if largest <= 2**53 else "long" if largest < 2**63 else "huge")
        elif kind is list:
            found.add(frozenset(_value_types(itertools.chain.from_iterable(v for v in values if type(v) is list))))
        elif kind is not type(None):
            found.add(kind.__name__)
    return found


def _arrow_type(types: set[Any]) -> pa.DataType | None:
    """The Arrow type that holds values of all ``types`` exactly, or None."""
    lists = [one for one in types if isinstance(one, frozenset)]
    if lists:
        inner = _arrow_type(set().union(*lists)) if len(lists) == len(types) else None
        return None if inner is None else pa.list_(inner)
    return next((kind for names, kind in _ARROW_TYPES if types <= names), None)


_ARROW_TYPES = (
    (frozenset(), pa.null()),
    ({"str"}, pa.string()),
    ({"bool"}, pa.bool_()),
    ({"int", "long"}, pa.int64()),
    ({"int", "float"}, pa.float64()),
)


def _objects(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with their places: one object per line, or a list of objects."""
    rows = file.lines()
    blank: list[str] = []
    first = next((line for line in rows if line.strip() or blank.append(line)), "")
    if first.lstrip().startswith("[") or file.suffix == ".json" and not _is_object(first):
        yield from _objects_of_list(_parse("".join([*blank, first, *rows]), file.name), file.name)
        return
    for number, line in enumerate(itertools.chain([first], rows), len(blank) + 1):
        if line.strip():
            where = f"{file.name}, line {number}"
            yield where, _checked_object(_parse(line, file.name, number), where)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, name: str, line: int | None = None) -> Any:
    """The JSON value of the text of a file, or of a line in it."""
    where = name if line is None else f"{name}, line {line}"
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}, line {line or error.lineno}, character {error.colno}: expected JSON: "
            f"{error.msg.removesuffix(' at')}"
        ) from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: a lone surrogate (\\ud800 to \\udfff) is not a character") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _objects_of_list(value: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if all(isinstance(one, list) for one in value.values()):
            raise ConfigError(
                f"{name}: got one object with {', '.join(map(repr, value))}, expected a list of objects, such as "
                f'[{{"text": "..."}}]. If one of these contains the rows, extract it: jq .{next(iter(value), "rows")} '
                f"{name} > rows.json"
            )
        value = [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{name}, row {number}"
        yield where, _checked_object({"text": row} if isinstance(row, str) else row, where)


def _checked_object(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise ConfigError(f'{where}: got {json.dumps(row):.80}, expected an object, such as {{"text": "..."}}')
