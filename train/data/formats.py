"""Files in, Arrow tables of one schema out. Values are read unchanged: no guessing of types or missing values.

Cells of .csv and .tsv are strings. Values of .json and .jsonl keep their JSON types, and a column without a single
Arrow type stays JSON text. A line of .txt is a row. Columns of .parquet have the file's declared types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from train.config import ConfigError
from train.data.delimited import delimited_tables
from train.data.json_rows import is_json, json_tables, json_types
from train.data.lines import BATCH, File, in_batches


def read_tables(
    files: Sequence[File], *, quoted_tsv: bool = False, features: datasets.Features | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of files as tables of one schema, each with the index of its file.

    Args:
      quoted_tsv: whether cells of .tsv may be quoted, as in .csv.
      features: the declared types of the columns, or None.

    Raises:
      ConfigError: with file and row, if a file does not have the format of its suffix, or its columns differ from
        those of the other files.
    """
    types = json_types(files) if features is None and any(map(is_json, files)) else {}
    schema: pa.Schema | None = None
    for number, file in enumerate(files):
        if is_json(file):
            tables = json_tables(file, types, features)
        elif file.suffix == ".txt":
            tables = _text_tables(file)
        elif file.suffix == ".parquet":
            tables = _parquet_tables(file)
        else:
            quoted = file.suffix == ".csv" or quoted_tsv
            tables = delimited_tables(file, "\t" if file.suffix == ".tsv" else ",", quoted)
        for table in tables:
            schema = schema or (table.schema if features is None else features.arrow_schema)
            yield number, _cast(table, schema, file)


def _cast(table: pa.Table, schema: pa.Schema, file: File) -> pa.Table:
    if table.schema.equals(schema, check_metadata=True):
        return table
    if set(table.column_names) != set(schema.names):
        raise ConfigError(
            f"{file.name}: got the columns {', '.join(table.column_names)}, expected {', '.join(schema.names)}, as in "
            "the other files or as declared"
        )
    try:
        return table_cast(table, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file.name}: its values do not have the types of the other files, or the declared types: {error}"
        ) from error


def _text_tables(file: File) -> Iterator[pa.Table]:
    stripped = (line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line for line in file.lines())
    for batch in in_batches(stripped):
        yield pa.table({"text": pa.array(batch, pa.string())})


def _parquet_tables(file: File) -> Iterator[pa.Table]:
    try:
        opened = pq.ParquetFile(file.path)
        schema = datasets.Features.from_arrow_schema(opened.schema_arrow).arrow_schema
        for batch in opened.iter_batches(BATCH // 10):
            yield table_cast(pa.Table.from_batches([batch]), schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{file.name} cannot be read as Parquet: {error}") from error
