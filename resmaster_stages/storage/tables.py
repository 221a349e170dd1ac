"""Reads and writes Parquet tables of a given schema. The schemas of a dataset are in `dataset.schemas`.

Invariants:
- Equal rows give equal bytes (with the same pyarrow): no time, host or random name is in a file.
- Schemas only grow, by nullable columns. Reading fills missing nullable columns with nulls and drops unknown columns.
- Pixel boxes are (y0, x0, y1, x1) in target px, half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.errors import ShardError

ROW_GROUP_ROWS = 65_536
PACKED_ROWS = 2_048
"""Rows that `TableWriter` holds as Python objects (some kilobytes each) before it converts them to Arrow."""


def encode_table(rows: Sequence[dict[str, Any]], schema: pa.Schema, metadata: dict[str, str] | None = None) -> bytes:
    """Encode rows as a Parquet file (zstd).

    Raises ValueError for an unknown column, for a missing or null value in a column that is not nullable, and for a
    value of the wrong type.
    """
    table = table_of(rows, schema)
    if metadata:
        table = table.replace_schema_metadata({**schema.metadata, **metadata})
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue()


class TableWriter:
    """Writes one Parquet file from rows that come in pieces. Memory holds one row group. Use as a context manager."""

    def __init__(self, sink: Path | BytesIO, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._pending: list[pa.Table] = []
        self.rows = 0
        self._file = pq.ParquetWriter(sink, schema, compression="zstd")

    def __enter__(self) -> TableWriter:
        return self

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows. Raises ValueError as `encode_table` does, for these rows or earlier ones."""
        self._rows += rows
        self.rows += len(rows)
        if len(self._rows) >= PACKED_ROWS:
            self._pack()

    def _pack(self) -> None:
        self._pending.append(table_of(self._rows, self._schema))
        self._rows = []
        if sum(map(len, self._pending)) >= ROW_GROUP_ROWS:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        table = pa.concat_tables(self._pending)
        end = len(table) if last else len(table) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        if end:
            self._file.write_table(table.slice(0, end), ROW_GROUP_ROWS)
        self._pending = [table.slice(end)]

    def __exit__(self, *exc_info: object) -> None:
        try:
            if self.rows and exc_info[0] is None:
                self._pack()
                self._flush(last=True)
        finally:
            self._file.close()


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Convert rows to a table of `schema`. Raises ValueError as `encode_table` does."""
    known = set(schema.names)
    for row in rows:
        if unknown := row.keys() - known:
            raise ValueError(f"unknown columns {sorted(unknown)} for table {_name(schema)}")
    try:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"table {_name(schema)}: {error}") from error
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"table {_name(schema)}: column {field.name!r} is missing in a row")
    return table


def decode_table(
    source: bytes | Path | IO[bytes], schema: pa.Schema, name: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a Parquet file as a table of `schema`. Nullable columns that the file lacks are null. `columns`: only these.

    Raises ShardError, naming `name`, if it is no Parquet file or lacks a column that is not nullable.
    """
    try:
        file = pq.ParquetFile(BytesIO(source) if isinstance(source, bytes) else source)
        wanted = schema if columns is None else pa.schema([schema.field(each) for each in columns])
        known = [field.name for field in wanted if field.name in file.schema_arrow.names]
        return _in_form(file.read(columns=known), wanted, name)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def facts_of(source: bytes, name: str) -> dict[str, str]:
    """The metadata of a Parquet file. Raises ShardError as `decode_table` does."""
    try:
        found = pq.read_schema(BytesIO(source)).metadata or {}
        return {key.decode(): value.decode() for key, value in found.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def written_by(source: bytes, name: str) -> str:
    """Name and version of the library that wrote a Parquet file. Raises ShardError as `decode_table` does."""
    try:
        return str(pq.read_metadata(BytesIO(source)).created_by)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def rows_at(source: bytes | Path, schema: pa.Schema, name: str, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a Parquet file at ascending `positions`. One row group is read at a time.

    Raises ShardError as `decode_table` does.
    """
    rows: list[dict[str, Any]] = []
    try:
        file = pq.ParquetFile(BytesIO(source) if isinstance(source, bytes) else source)
        start = 0
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            chosen = [position - start for position in positions if start <= position < end]
            if chosen:
                rows += _in_form(file.read_row_group(number), schema, name).take(chosen).to_pylist()
            start = end
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error
    return rows


def _in_form(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(table[field.name].cast(field.type))
        elif field.nullable:
            columns.append(pa.nulls(len(table), field.type))
        else:
            raise ShardError(f"{name}: has no column {field.name!r}; it was written by another version")
    return pa.table(columns, schema=schema)


def _unreadable(name: str, error: Exception) -> ShardError:
    first_line = str(error).split("\n", 1)[0]
    return ShardError(f"{name}: not a readable Parquet file ({first_line})")


def _name(schema: pa.Schema) -> str:
    return schema.metadata[b"table"].decode()
