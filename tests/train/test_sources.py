"""Files of every format are read as written, or an error names file and row; and the provenance of rows."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.runs import program
from train.__main__ import parse
from train.config import ConfigError, DataConfig
from train.data import lines
from train.data import tables as data
from train.data.lines import decode
from train.data.tables import Table, column, texts
from train.rundir.claim import claim
from train.rundir.directory import RunDirectory

BOM = "\ufeff"
CELLS = {
    "dates": ["2024-05-01", "2024-05-01T10:00:00Z", "2024-05-01 00:00:00", "10:30", "01/02/2003", "1714521600"],
    "numbers": ["007", "1.10", "1e5", "-0", "0x1F", "1_000", "1,000", "inf", "9" * 40, "3.0"],
    "words for nothing": ["None", "NA", "N/A", "null", "NULL", "nan", "NaN", "#N/A", "-", "<NA>", ""],
    "truth": ["true", "False", "yes", "0", "1"],
    "quotes": ['say "hi"', '"', '""', 'a "b', '"open', '"whole"', "'", "it's", "\\", '\\"', "\\n"],
    "delimiters": ["a, b", "a;b", ",", "a,b,", "|"],
    "spaces": [" a ", "  ", "\u00a0", "a  b"],
    "unicode": ["é", "日本語", "😀", "a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0c", "\ufeffx", "e\u0301", "\x1c"],
    "line ends": ["a\nb", "a\r\nb", "\n", "a\n\nb"],
    "tabs": ["a\tb", "\t"],
}
LABELS = ["None", "NA", "007", "é"]


def delimited(rows: list[dict[str, str]], end: str, delimiter: str, **quoting: Any) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end, **quoting)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def plain(rows: list[dict[str, str]], end: str) -> bytes:
    return "".join("\t".join(cells) + end for cells in ([*rows[0]], *(row.values() for row in rows))).encode()


def parquet(rows: list[dict[str, Any]], _: str = "") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, str]], str], bytes]] = {
    "jsonl": lambda rows, end: "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(),
    "escaped.jsonl": lambda rows, end: "".join(json.dumps(row) + end for row in rows).encode(),
    "json": lambda rows, end: json.dumps(rows, indent=2, ensure_ascii=False).replace("\n", end).encode(),
    "lines.json": lambda rows, end: "".join(json.dumps(row) + end for row in rows).encode(),
    "csv": lambda rows, end: delimited(rows, end, ","),
    "all.csv": lambda rows, end: delimited(rows, end, ",", quoting=csv.QUOTE_ALL),
    "csv.gz": lambda rows, end: gzip.compress(delimited(rows, end, ",")),
    "tsv": plain,
    "quoted.tsv": lambda rows, end: delimited(rows, end, "\t"),
    "txt": lambda rows, end: "".join(row["text"] + end for row in rows).encode(),
    "parquet": parquet,
}


def read(file: Path, content: bytes | str | None = None, **options: Any) -> Table:
    if content is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return data.read(str(file), file.parent / "cache", "data.train", **options)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


# Strings stay strings, rows are rows


@pytest.mark.parametrize("what", CELLS)
@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_read_is_what_was_written(tmp_path, kind, what):
    """For all that a cell can hold, with either line end, with and without a byte order mark."""
    cells = CELLS[what]
    rows = [{"text": cell, "label": LABELS[i % 4], "größe 1": "x"} for i, cell in enumerate(cells)]
    for number, (end, mark) in enumerate((("\n", ""), ("\r\n", ""), ("\r\n", BOM))):
        content = WRITERS[kind](rows, end)
        if kind == "csv.gz":
            content = gzip.compress(mark.encode() + gzip.decompress(content))
        elif kind != "parquet":
            content = mark.encode() + content
        file = tmp_path / f"{number}.{kind}"
        if what in ("line ends", "tabs") and kind == "tsv":
            assert re.search(rf"{re.escape(str(file))}, row 1 \(line 2\): ", refusal(lambda: read(file, content)))  # noqa: B023
            continue
        table = read(file, content, quoted_tsv=kind == "quoted.tsv")
        if kind == "txt":
            if what == "line ends":  # a line of a file holds none
                continue
            assert texts(table, "text", "task.text") == cells
            continue
        assert texts(table, "text", "task.text") == cells
        assert column(table, "label", "task.label") == [row["label"] for row in rows]
        assert table.column_names == ["text", "label", "größe 1"] and len(table) == len(rows)


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    """A quote that opens in one row and closes three rows later does not swallow the rows between."""
    content = 'text\tlabel\n"a\t1\nb\t2\nc\t3\nd"\t4\ne\t5\n'
    table = read(tmp_path / "rows.tsv", content)
    assert column(table, "text", "task.text") == ['"a', "b", "c", 'd"', "e"]
    quoted = read(tmp_path / "rows.csv", 'text,label\n"a\rb","\r\n"\n')
    assert quoted.to_list() == [{"text": "a\rb", "label": "\r\n"}]
    asked = read(tmp_path / "asked.tsv", 'text\tlabel\n"a\tb"\t1\n', quoted_tsv=True)
    assert column(asked, "text", "task.text") == ["a\tb"]


def test_an_index_column_is_a_column(tmp_path):
    table = read(tmp_path / "rows.csv", ",text,label\n0,a,1\n1,b,0\n")  # as pandas writes one
    assert table.column_names == ["", "text", "label"]
    assert column(table, "text", "task.text") == ["a", "b"] and column(table, "label", "task.label") == ["1", "0"]


def test_json_keeps_its_types(tmp_path):
    rows = [
        {"whole": 2**63 - 1, "number": 0.1, "yes": True, "pixels": [0, 1, 2], "floats": [[0.5], []], "empty": []},
        {"whole": -1, "number": 3, "yes": False, "pixels": [], "floats": [[1], [2.5, 3]], "empty": []},
        {"whole": None, "number": 123456789.12345678, "yes": True, "pixels": [7] * 9, "floats": [], "empty": []},
    ]
    mixed = [
        {"talk": [{"role": "user", "content": "a"}], "mixed": 1, "huge": 12345678901234567890123, "null": None},
        {"talk": [{"role": "tool", "content": [{"text": "2024-05-01"}], "n": 0.12345678901234568}], "mixed": "1"},
        {"talk": [], "mixed": [1, "a", None, {"b": [0.1]}], "huge": 1, "null": None, "late": "\u2028"},
    ]
    for kind in ("jsonl", "json"):
        table = read(tmp_path / f"rows.{kind}", WRITERS[kind]([a | b for a, b in zip(rows, mixed, strict=True)], "\n"))
        for name in rows[0]:
            values = data.Column(table, name)
            assert values == [row[name] for row in rows], name
        for name in ("talk", "mixed", "huge", "null", "late"):
            assert data.Column(table, name) == [row.get(name) for row in mixed], name
        assert table.features["pixels"] == datasets.List(datasets.Value("int64"))
        reordered = table.select([2, 0]).select([1])
        assert column(reordered, "talk", "task.messages") == [mixed[0]["talk"]]
    lines = read(tmp_path / "list.json", '["a", "2024-05-01"]')
    assert column(lines, "text", "task.text") == ["a", "2024-05-01"]
    nan = read(tmp_path / "nan.jsonl", '{"label": NaN}\n{"label": 1.5}\n')
    assert "are missing, in row 1 of" in refusal(lambda: column(nan, "label", "task.label"))


# Errors name file, row and column

BAD = {
    "more.csv": ("text,label\na,1\nb, c,2\n", "row 2 (line 3): got 3 cells, expected 2", "quote cells"),
    "every.csv": ("text,label\nhello, you,1\nbye, you,0\n", "row 1 (line 2): got 3 cells, expected 2"),
    "trailing.csv": ("text,label\na,1,\nb,2,\n", "row 1 (line 2): got 3 cells"),
    "header.csv": ("text,label,\na,1,\n", "column 3 of 3 has no name"),
    "fewer.csv": ("text,label\n\na,1\n\nb\n", "row 2 (line 5): got 1 cells, expected 2"),
    "later.csv": ('text,label\n"a\nb\nc",1\nd\n', "row 2 (line 5): got 1 cells"),
    "unclosed.csv": ('text,label\na,1\n"b,2\nc,3\n', "row 2 (line 3): a quote is opened here and never closed"),
    "junk.csv": ('text,label\n"a" b,1\n', "row 1 (line 2)", "write two quotes for one"),
    "mac.csv": ("text,label\ra,1\r", "the header (line 1)", r"a line ends in \r alone"),
    "twice.csv": ("text,text\na,b\n", "has 'text' twice"),
    "semicolons.csv": ("text;label\na;1\n", "the header is one column, 'text;label'", "save the file with commas"),
    "tabs.csv": ("text\tlabel\na\t1\n", r"separated by ',', got '\t'; name the file .tsv"),
    "commas.tsv": ("text,label\na,1\n", "name the file .csv"),
    "nothing.csv": ("text,label\n", "is empty: no rows"),
    "more.tsv": ("text\tlabel\na\t1\t2\n", "row 1 (line 2): got 3 cells", "--data.quoted-tsv"),
    "latin.csv": ("text,label\na,1\nné,1\n".encode("latin1"), "line 3: expected UTF-8, got the byte 0xe9"),
    "latin.tsv": ("text\tlabel\né\t1\n".encode("latin1"), "line 2: expected UTF-8"),
    "latin.jsonl": ('{"text": "a"}\n{"text": "é"}\n'.encode("latin1"), "line 2: expected UTF-8"),
    "latin.json": ('[\n{"text": "é"}]'.encode("latin1"), "line 2: expected UTF-8"),
    "latin.txt": ("a\n\né\n".encode("latin1"), "line 3: expected UTF-8"),
    "utf16.csv": ("text,label\na,1\n".encode("utf-16"), "line 1", "the byte order mark of UTF-16", "iconv -f utf-16"),
    "nul.txt": ("a\nb\0\n", "line 2", "NUL"),
    "cut.jsonl": ('{"text": "a"}\n\n{"text": "b\n', "line 3, character 12: expected JSON: Invalid control character"),
    "first.jsonl": ('{"text": \n{"text": "b"}\n', "line 1, character"),
    "list.jsonl": ('{"text": "a"}\n["b"]\n', 'line 2: got ["b"], expected an object'),
    "word.jsonl": ('"a"\n', 'line 1: got "a", expected an object'),
    "twice.jsonl": ('{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: the key 'text' occurs twice"),
    "half.jsonl": ('{"text": "\\ud800"}\n', "line 1: a lone surrogate"),
    "deep.jsonl": ('{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2"),
    "cut.json": ('[{"text": "a"},\n{"text": \n', "line 3, character 1: expected JSON"),
    "row.json": ('[{"text": "a"}, 3]', "row 2: got 3, expected an object"),
    "object.json": ('{"data": [{"text": "a"}],\n "version": []}', "got one object with 'data', 'version'", "jq .data"),
    "empty.jsonl": ("", "is empty"),
    "blank.jsonl": (" \n\n", "is empty"),
    "none.json": ("[]", "is empty"),
    "empty.csv": (BOM, "is empty"),
    "empty.txt": ("", "is empty"),
    "empty.parquet": ("", "cannot be read as Parquet"),
    "none.parquet": (parquet([{"text": "a"}])[:-1], "cannot be read as Parquet"),
    "rows.xlsx": ("x", "ends in '.xlsx'; expected one of .jsonl"),
    "damaged.csv.gz": (gzip.compress(b"text\na\n")[:-9], "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_says_where(tmp_path, name):
    content, *expected = BAD[name]
    message = refusal(lambda: read(tmp_path / name, content))
    assert message.startswith("data.train: ") and f"{tmp_path / name}" in message
    assert [part for part in expected if part not in message] == [], message


def test_the_advice_on_encodings_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for encoding in ("latin1", "utf-16"):
        message = refusal(lambda: read(tmp_path / "rows.csv", "text,label\né,1\n".encode(encoding)))  # noqa: B023
        command = re.search(r"iconv .*", message)
        assert command and os.system(command[0]) == 0
        assert column(read(tmp_path / "utf8-rows.csv"), "text", "task.text") == ["é"]
    assert decode("\ufeffa\nb".encode(), "x") == "a\nb"


UNFIT = {
    "null": ([{"a": "x"}, {"a": None}, {}], "task.text", "2 of 3 values of the column 'a' are missing, in rows 2, 3"),
    "empty label": ([{"a": "x"}, {"a": ""}], "task.label", "1 of 2 values of the column 'a' are missing, in row 2 of "),
    "label list": ([{"a": ["x"]}] * 2, "task.label", "the column 'a' holds a list in row 1 of ", "a name or a number"),
    "label object": ([{"a": {"b": 1}}], "task.label", "holds an object in row 1 of "),
    "text list": ([{"a": ["x"]}], "task.text", "holds a list in row 1 of ", "expected text"),
    "text object": ([{"a": {"b": "c"}}], "task.completion", "holds an object in row 1 of ", "expected text"),
    "text float": ([{"a": 1.5}], "task.prompt", "holds a number in row 1 of ", "1.5", "expected text"),
    "text truth": ([{"a": True}], "task.text", "holds true or false in row 1 of "),
    "mixed": ([{"a": "x"}, {"a": "y"}, {"a": 3}], "task.text", "a number in row 3 of ", "text in all rows, as in row"),
    "mixed label": ([{"a": 3}, {"a": "3"}], "task.label", "holds text in row 2 of ", "a number in all rows"),
    "mixed lists": ([{"a": [1]}, {"a": "x"}], "task.text", "holds text in row 2 of "),
    "many": ([{"a": None}] * 7, "task.text", "rows 1, 2, 3, 4, 5 of ", " and 2 more; remove"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_value_that_does_not_fit_is_an_error_with_its_row(tmp_path, name):
    rows, field, *expected = UNFIT[name]
    for kind in ("jsonl", "json", *(() if "mixed" in name else ("parquet",))):
        table = read(tmp_path / f"rows.{kind}", WRITERS[kind](rows, "\n"))
        message = refusal(lambda: (column if field == "task.label" else texts)(table, "a", field))  # noqa: B023
        assert message.startswith(f"{field}: ") and f"rows.{kind}" in message
        assert [part for part in expected if part not in message] == [], message


def test_rows_are_numbered_as_in_their_file(tmp_path):
    """Also in a selection of rows, in another order, or from several files."""
    for name in ("train-0", "train-1"):
        rows = [{"text": f"{name} {i}", "label": "" if i in (2, 5) else "x"} for i in range(8)]
        read(tmp_path / "set" / f"{name}.csv", delimited(rows, "\n", ","))
    table = read(tmp_path / "set" / "train-0.csv")
    for chosen in ([0, 1, 5, 2], range(2, 6), [7, 5, 2]):
        message = refusal(lambda: column(table.select(chosen), "label", "task.label"))  # noqa: B023
        assert f"in rows 3, 6 of {tmp_path}/set/train-0.csv; remove these rows" in message
    both = data.read(str(tmp_path / "set"), tmp_path / "cache", "data.train")
    message = refusal(lambda: column(both, "label", "task.label"))
    assert f"4 of 16 values of the column 'label' are missing, in rows 3, 6 of {tmp_path}/set/train-0" in message
    assert "train-0.csv and 2 more; remove" in message
    message = refusal(lambda: column(both.select([15, 13, 0]), "label", "task.label"))
    assert f"in row 6 of {tmp_path}/set/train-1.csv" in message
    assert "in row 2; remove" in refusal(lambda: column(Table.from_dict({"a": ["x", None]}), "a", "task.text"))


def test_parquet_is_as_its_types_say(tmp_path):
    columns = {
        "category": pa.array(["b", "None", "b"]).dictionary_encode(),
        "view": pa.array(["NA", "", "007"], pa.string_view()),
        "large": pa.array(["a", "b", "c"], pa.large_string()),
        "lists": pa.array([[1, 2], [], [3]]),
        "exact": pa.array([Decimal("1.10"), Decimal("2.00"), Decimal("0.30")]),
        "time": pa.array([datetime.datetime(2024, 5, 1)] * 3),
        "day": pa.array([datetime.date(2024, 5, 1)] * 3),
        "bytes": pa.array([b"a"] * 3),
        "hole": pa.array([1.0, None, 2.0]),
        "nan": pa.array([1.0, 2.0, float("nan")]),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=2)
    table = read(tmp_path / "rows.parquet")
    for name in ("category", "view", "large", "lists", "exact"):
        assert column(table, name, "task.text") == columns[name].to_pylist(), name
    for field in ("task.text", "task.label", "task.image"):
        for name in ("time", "day"):
            message = refusal(lambda: column(table, name, field))  # noqa: B023
            assert f"{field}: the column {name!r} holds a date or time in row 1 of" in message and "as text" in message
    assert "holds bytes in row 1" in refusal(lambda: column(table, "bytes", "task.text"))
    assert column(table, "bytes", "task.image") == [b"a"] * 3
    assert "missing, in row 2 of" in refusal(lambda: column(table, "hole", "task.label"))
    assert "missing, in row 3 of" in refusal(lambda: column(table, "nan", "task.label"))
    names = datasets.Dataset.from_dict(
        {"label": [1, 0]}, features=datasets.Features({"label": datasets.ClassLabel(names=["bad", "good"])})
    )
    names.to_parquet(tmp_path / "names.parquet")
    assert read(tmp_path / "names.parquet").features["label"].names == ["bad", "good"]  # pyright: ignore
    pq.write_table(pa.table({"a": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))}), tmp_path / "map.parquet")
    assert "map.parquet cannot be read as Parquet" in refusal(lambda: read(tmp_path / "map.parquet"))


# Folders


def test_a_folder_is_read_as_its_files_are(tmp_path):
    rows = [{"text": cell, "label": "None"} for cell in CELLS["words for nothing"] + CELLS["dates"] + CELLS["numbers"]]
    for kind in ("csv", "tsv", "jsonl", "json", "parquet"):
        folder = tmp_path / kind
        for name, count in (("train", 9), ("test", 5)):
            read(folder / f"{name}.{kind}", WRITERS[kind](rows[:count], "\n"))
        tables = data.load(DataConfig(str(folder)), tmp_path / "cache")
        for name, count in (("train", 9), ("validation", 5)):
            assert column(tables[name], "text", "task.text") == [row["text"] for row in rows[:count]], kind
            assert column(tables[name], "label", "task.label") == ["None"] * count
        provenance = tables["validation"].provenance
        assert provenance and (provenance.split, provenance.files) == ("test", {f"{folder}/test.{kind}": 5})
    message = refusal(lambda: data.read(f"{tmp_path}/csv:dev", tmp_path / "cache", "data.train"))
    assert "no split dev; expected one of train, test" in message
    (tmp_path / "csv" / "train.csv").write_text("text,label\na\n")
    message = refusal(lambda: data.read(f"{tmp_path}/csv", tmp_path / "cache", "data.train"))
    assert f"{tmp_path}/csv/train.csv, row 1 (line 2): got 1 cells" in message


def test_files_of_a_folder_have_one_schema(tmp_path):
    read(tmp_path / "set" / "train-0.jsonl", '{"text": "a", "n": 1}\n')
    read(tmp_path / "set" / "train-1.jsonl", '{"text": "2024-05-01", "n": 1.5, "more": [1, "a"]}\n')
    table = data.read(str(tmp_path / "set"), tmp_path / "cache", "data.train")
    assert column(table, "text", "task.text") == ["a", "2024-05-01"]
    assert column(table, "n", "task.label") == [1, 1.5] and data.Column(table, "more") == [None, [1, "a"]]
    for name, names in (("train-0", "text,label"), ("train-1", "label,text")):
        read(tmp_path / "turned" / f"{name}.csv", f"{names}\n{names}\n")
    table = data.read(str(tmp_path / "turned"), tmp_path / "cache", "data.train")
    assert column(table, "label", "task.label") == ["label"] * 2
    read(tmp_path / "turned" / "train-1.csv", "text,score\na,1\n")
    message = refusal(lambda: data.read(str(tmp_path / "turned"), tmp_path / "cache", "data.train"))
    assert f"{tmp_path}/turned/train-1.csv: got the columns text, score, expected text, label" in message


def test_declared_types_are_those_of_the_folder(tmp_path):
    """Types come from the README.md that declares them."""
    about = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.*\n"
        "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': bad\n          '1': good\n---\n"
    )
    for kind, content in (("csv", "text,label\n007,good\nNA,0\n"), ("jsonl", '{"text": "007", "label": 1}\n{"text": "NA", "label": "bad"}\n')):  # fmt: skip  # noqa: E501
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "README.md").write_text(about)
        (folder / f"rows.{kind}").write_text(content)
        table = data.read(str(folder), tmp_path / "cache", "data.train")
        assert column(table, "text", "task.text") == ["007", "NA"]
        assert column(table, "label", "task.label") == [1, 0]
        assert table.features["label"].names == ["bad", "good"]  # pyright: ignore
        (folder / f"rows.{kind}").write_text(content.replace("bad", "worse").replace("good", "worse"))
        message = refusal(lambda: data.read(str(folder), tmp_path / "cache", "data.train"))  # noqa: B023
        assert f"rows.{kind}: its values do not have the" in message and "worse" in message


def test_files_of_the_hub_are_read_as_files(tmp_path, monkeypatch):
    """Offline: a folder stands for the hub, and its files are downloaded like those of the hub."""
    read(tmp_path / "set" / "train.csv", "text,label\n007,None\n")
    builder = datasets.load_dataset_builder(str(tmp_path / "set"), cache_dir=str(tmp_path / "hub"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names, **_: asked.append(names) or builder)
    table = data.read("owner/name/config:train", tmp_path / "cache", "data.validation")
    assert asked == [("owner/name", "config")]
    assert table.to_list() == [{"text": "007", "label": "None"}]
    assert table.provenance and (table.provenance.source, table.provenance.split) == ("owner/name/config", "train")
    # Others are read by datasets, and the digest of their rows does not depend on how they are stored.
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(2500)]})
    parts = datasets.concatenate_datasets([rows.select(range(999)), rows.select(range(999, 2500))])
    digests = []
    for one in (rows, parts, rows.select(range(2499, -1, -1)).flatten_indices()):
        monkeypatch.setattr(builder, "name", "webdataset")
        found = datasets.DatasetDict({"train": one})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)  # noqa: B023
        provenance = data.read("owner/name:train", tmp_path / "cache", "data.train").provenance
        assert provenance and provenance.read == 2500
        digests.append(provenance.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_of_pictures_is_kept_by_content(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("a", 0), ("b", 255)):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        image.new("L", (2, 2), colour).save(tmp_path / "set" / "train" / name / "x.png")
    first = data.read(f"{tmp_path}/set:train", tmp_path / "cache", "data.train")
    assert len(column(first, "image", "task.image")) == 2 and first.features["label"].names == ["a", "b"]  # pyright: ignore
    times = os.stat(tmp_path / "set" / "train" / "a")
    shutil.move(tmp_path / "set" / "train" / "a" / "x.png", tmp_path / "set" / "train" / "b" / "y.png")
    os.utime(tmp_path / "set" / "train" / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    again = data.read(f"{tmp_path}/set:train", tmp_path / "cache", "data.train")
    assert first.provenance and again.provenance and first.provenance.digest != again.provenance.digest
    assert len(again) == 2


# The cache, and provenance


def test_an_edited_file_is_read_again_whatever_its_time(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    assert column(read(file, "text\na\n"), "text", "task.text") == ["a"]
    then = os.stat(file).st_mtime_ns
    file.write_text("text\nb\n")
    os.utime(file, ns=(then, then))
    assert column(read(file), "text", "task.text") == ["b"]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("converted again")

    with monkeypatch.context() as patched:
        patched.setattr("train.data.arrow_cache.read_tables", never)
        assert column(read(file), "text", "task.text") == ["b"]
        copy = tmp_path / "copy.csv"
        shutil.copy(file, copy)
        assert column(read(copy), "text", "task.text") == ["b"]
        with pytest.raises(ConfigError, match="converted again"):
            read(tmp_path / "rows.txt", file.read_bytes())  # another format of the same bytes
    for kept in (tmp_path / "cache" / "data").glob("*/rows.arrow"):
        kept.write_bytes(kept.read_bytes()[:-60])
    assert column(read(file), "text", "task.text") == ["b"]
    assert not list((tmp_path / "cache" / "data").glob("*draft-*"))


def test_large_files_are_converted_in_parts(tmp_path, monkeypatch):
    """Types are those of all rows, whichever part they are in."""
    monkeypatch.setattr(lines, "BATCH", 3)
    rows = [{"a": i if i < 8 else i + 0.5, "b": "x" if i else None} for i in range(10)]
    table = read(tmp_path / "rows.jsonl", WRITERS["jsonl"](rows, "\n"))
    assert data.Column(table, "a") == [row["a"] for row in rows] and data.Column(table, "b") == [
        row["b"] for row in rows
    ]
    assert read(tmp_path / "rows.csv", "a\n" + "x\n" * 10).num_rows == 10
    late = read(tmp_path / "late.jsonl", '{"a": 1}\n' * 7 + '{"a": "x"}\n')
    assert "holds text in row 8 of" in refusal(lambda: column(late, "a", "task.label"))


def test_provenance_counts_every_row(tmp_path):
    rows = [{"text": str(i), "label": "x", "split": "train" if i % 4 else "dev"} for i in range(40)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    tables = data.load(DataConfig(f"{file}:train", f"{file}:dev", limit=7, validation_limit=9), tmp_path / "cache")
    provenance = tables["train"].provenance
    assert provenance and provenance.to_json() == {
        "source": str(file), "found": None, "files": {str(file): 40}, "split": "train",
        "digest": data.source_digest(str(file)), "read": 40, "used": 7,
        "dropped": {"in other splits": 10, "beyond the limit of 7": 23},
    }  # fmt: skip
    assert provenance.describe() == (
        f"{file}, split train: 40 rows read, 7 used; left out: 10 in other splits, 23 beyond the limit of 7; "
        f"sha256 {provenance.digest[:12]}"
    )
    assert tables["validation"].provenance and tables["validation"].provenance.used == len(tables["validation"]) == 9
    tables = data.load(DataConfig(str(file), holdout=0.25, limit=20), tmp_path / "cache")
    dropped = {name: table.provenance.dropped for name, table in tables.items() if table.provenance}
    assert dropped == {
        "train": {"held out for validation": 10, "beyond the limit of 20": 10},
        "validation": {"used for training": 30},
    }
    assert not set(column(tables["train"], "text", "task.text")) & set(
        column(tables["validation"], "text", "task.text")
    )
    tables["train"].count_dropped(3, "without a token that carries loss")
    assert tables["train"].provenance and tables["train"].provenance.used == 17
    tiny.write_jsonl(tmp_path / "test.jsonl", rows[:5])
    beside = data.load(DataConfig(str(file)), tmp_path / "cache")["validation"].provenance
    assert beside and beside.describe().startswith(
        f"{tmp_path}/test.jsonl, found next to rows.jsonl: 5 rows read, all used"
    )


def test_a_run_on_other_data_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    """Without a directory, the newest unfinished run resumes if its data are the same."""
    monkeypatch.chdir(tmp_path)
    config = parse([])
    folder = Path("runs") / f"{config.name}-{config.mode}-seed{config.seed}-20260101-000000"
    (folder / "checkpoints" / "5").mkdir(parents=True)
    RunDirectory(folder).write_config(config)
    now = {"train": {"source": "a.csv", "digest": "1" * 64}, "validation": {"source": "b.csv", "digest": "2" * 64}}

    def choose() -> tuple[Path, str]:
        with claim(config, now) as directory:
            directory.begin(config, now)
            return directory.path, capsys.readouterr().out

    assert choose() == (folder, "")  # of an earlier version, which did not write data.json
    assert json.loads((folder / "data.json").read_text()) == now
    assert choose() == (folder, "")
    now["train"]["digest"] = "3" * 64
    path, printed = choose()
    assert (
        path != folder
        and f"{folder} is not resumed, its data changed" in printed
        and "data.train: a.csv has the sha256 333" in printed
    )
    assert "data.validation" not in printed


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tiny.write_sentiment(tmp_path_factory.mktemp("sources"))


@pytest.mark.slow
def test_a_run_reports_its_data_and_resumes_with_the_same_only(work, tmp_path):
    for name in ("train", "validation"):
        shutil.copy(work / f"{name}.jsonl", tmp_path / ("test.jsonl" if name == "validation" else "train.jsonl"))
    options = f"--data.train {tmp_path}/train.jsonl --cache-dir {tmp_path}/cache --data.limit 48 --fit.epochs 1"
    flags = tiny.sentiment_flags(work, tmp_path / "run", options)
    code, printed = program(*flags)
    assert code == 0, printed
    lines = [line for line in printed.splitlines() if line.startswith("data.")]
    assert lines[0].startswith(
        f"data.train: {tmp_path}/train.jsonl: 64 rows read, 48 used; left out: 16 beyond the lim"
    )
    assert lines[1].startswith(
        f"data.validation: {tmp_path}/test.jsonl, found next to train.jsonl: 20 rows read, all used"
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"] == json.loads((tmp_path / "run" / "data.json").read_text())
    assert {name: (one["read"], one["used"]) for name, one in summary["data"].items()} == {
        "train": (64, 48), "validation": (20, 20),
    }  # fmt: skip
    assert summary["data"]["train"]["digest"] == data.source_digest(str(tmp_path / "train.jsonl"))

    kept = (tmp_path / "test.jsonl").read_text()
    tiny.write_jsonl(tmp_path / "test.jsonl", tiny.sentences(21, start=100))
    code, printed = program(*flags)
    assert (
        code == 2 and "holds a run on other data:" in printed and f"data.validation: {tmp_path}/test.jsonl" in printed
    )
    code, printed = program("eval", str(tmp_path / "run"))
    assert code == 0 and "21 rows read, all used" in printed and "not the run's examples" in printed
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed
    assert program(*flags)[0] == 2
    (tmp_path / "test.jsonl").write_text(kept)
    code, printed = program(*flags)
    assert code == 0 and "resuming " in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"] == summary["metrics"]
    code, printed = program("eval", str(tmp_path / "run"))
    assert code == 0 and "not the run's examples" not in printed
