"""Parquet tables: their schemas, and reading and writing them. Knows nothing about who fills them.

Invariants:
- Equal rows give equal bytes (with the same pyarrow): no time, host or random name is in a file.
- Schemas only grow, by nullable columns: older files read as nulls there, newer files' extra columns are left out.
- Pixel boxes are (y0, x0, y1, x1) in target px, half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.config import Stage
from resmaster_stages.errors import ShardError

ROW_GROUP_ROWS = 65_536
PACKED_ROWS = 2_048
"""Rows that `TableWriter` holds as Python objects, some kilobytes each, before it packs them."""


def _schema(table: str, fields: list[tuple[str, pa.DataType, bool]]) -> pa.Schema:
    """A schema from (name, type, nullable), with its name and version as metadata."""
    columns = [pa.field(name, kind, nullable=nullable) for name, kind, nullable in fields]
    return pa.schema(columns, metadata={"table": table, "schema_version": "1"})


CAPTIONS_SCHEMA = _schema(
    "captions",
    [
        ("key", pa.string(), False),
        ("grid", pa.string(), False),
        ("row", pa.int16(), False),
        ("col", pa.int16(), False),
        ("y0", pa.int32(), False),
        ("x0", pa.int32(), False),
        ("y1", pa.int32(), False),
        ("x1", pa.int32(), False),
        ("caption", pa.string(), False),
        ("n_tokens", pa.int16(), False),
        ("truncated", pa.bool_(), False),
        ("model", pa.string(), True),
        ("revision", pa.string(), True),
        ("status", pa.string(), False),
        ("prompt_hash", pa.string(), True),
        ("fit", pa.float64(), True),
    ],
)
"""One row per patch. `grid` is "HxW/window/stride" in px. `status` is ok, replaced (a neighbour's caption, which fits better),
fallback or empty (the global prompt). `fit` is how well the caption suits the patch, null where that was not checked."""

DESCRIBED = ("ok", "replaced")
"""Statuses of captions that tell of a patch; with any other the row holds the global prompt."""

QUALITY_SCHEMA = _schema(
    "quality",
    [
        ("key", pa.string(), False),
        ("width", pa.int32(), False),
        ("height", pa.int32(), False),
        ("clip_score", pa.float64(), True),
        ("agreement_psnr", pa.float64(), True),
        ("agreement_ssim", pa.float64(), True),
        ("detail_energy", pa.float64(), True),
        ("seam", pa.float64(), True),
        ("seam_worst", pa.float64(), True),
        ("lost_worst", pa.float64(), True),
        ("added_worst", pa.float64(), True),
        ("colour_worst", pa.float64(), True),
        ("clipped", pa.float64(), True),
        ("phash", pa.string(), True),
        ("luminance_mean", pa.float64(), True),
        ("luminance_std", pa.float64(), True),
        ("flags", pa.list_(pa.string()), False),
    ],
)
"""One row per image."""

PLAN_SCHEMA = _schema(
    "plan",
    [
        ("key", pa.string(), False),
        ("shard", pa.int32(), False),
        ("index", pa.int64(), False),
        ("prompt", pa.string(), False),
        ("negative_prompt", pa.string(), False),
        ("height", pa.int32(), False),
        ("width", pa.int32(), False),
        ("replica", pa.int32(), False),
        ("source", pa.string(), True),
    ],
)
"""One row per planned sample; `index` counts through the whole dataset, `height` and `width` are low-res px."""

REJECTED_SCHEMA = _schema(
    "rejected",
    [("source", pa.string(), False), ("text", pa.string(), False), ("reason", pa.string(), False)],
)
"""What the plan turned down: where it came from, its beginning, and why."""

LEDGER_SCHEMA = _schema(
    "errors",
    [
        ("key", pa.string(), False),
        ("stage", pa.string(), False),
        ("stage_hash", pa.string(), False),
        ("shard", pa.int32(), False),
        ("error_class", pa.string(), False),
        ("message", pa.string(), False),
        ("attempt", pa.string(), False),
        ("attempt_number", pa.int32(), False),
    ],
)
"""One row per failed sample and attempt; `attempt_number` counts the sample's failures in this stage from 1."""

MANIFEST_SCHEMA = _schema(
    "manifest",
    [
        ("key", pa.string(), False),
        ("index", pa.int64(), False),
        ("shard", pa.int32(), False),
        ("replica", pa.int32(), False),
        ("prompt", pa.string(), False),
        ("negative_prompt", pa.string(), False),
        ("source", pa.string(), True),
        ("high_res_object", pa.string(), False),
        ("high_res_member", pa.string(), False),
        ("high_res_offset", pa.int64(), False),
        ("high_res_bytes", pa.int64(), False),
        ("low_res_object", pa.string(), False),
        ("low_res_member", pa.string(), False),
        ("low_res_offset", pa.int64(), False),
        ("low_res_bytes", pa.int64(), False),
        ("low_res_height", pa.int32(), False),
        ("low_res_width", pa.int32(), False),
        ("captions_object", pa.string(), True),
        *[(field.name, field.type, field.nullable) for field in QUALITY_SCHEMA if field.name != "key"],
        ("low_res_hash", pa.string(), False),
        ("captions_hash", pa.string(), True),
        ("high_res_hash", pa.string(), False),
        ("quality_hash", pa.string(), False),
    ],
)
"""One row per finished sample. Objects are relative to the dataset; offset and bytes are those of the image file in the
tar, so that one range request fetches it. `height` and `width` are those of the high-res image."""

COMPARE_SCHEMA = _schema(
    "compare",
    [
        ("scale", pa.string(), False),
        ("method", pa.string(), False),
        ("dataset", pa.string(), False),
        ("features", pa.string(), False),
        ("reference", pa.string(), False),
        ("reference_samples", pa.int64(), False),
        ("samples", pa.int64(), False),
        ("height", pa.int32(), False),
        ("width", pa.int32(), False),
        *[
            (name, pa.float64(), True)
            for view in ("r", "c", "u")
            for name in (f"fid_{view}", f"kid_{view}", f"kid_{view}_low", f"kid_{view}_high", f"is_{view}")
        ],
        ("clip_score", pa.float64(), True),
        ("agreement_psnr", pa.float64(), True),
        ("agreement_ssim", pa.float64(), True),
        ("perceptual_distance", pa.float64(), True),
        ("detail_energy", pa.float64(), True),
        ("seam", pa.float64(), True),
        ("seam_worst", pa.float64(), True),
        ("flagged", pa.float64(), True),
        ("repeat_rate", pa.float64(), True),
        ("repeat_surplus", pa.float64(), True),
        ("unet_calls", pa.float64(), True),
        ("unet_rows", pa.float64(), True),
        ("unet_native_rows", pa.float64(), True),
        ("seconds_captions", pa.float64(), True),
        ("seconds_high_res", pa.float64(), True),
    ],
)
"""One row per method and scale, and one of drawn pictures where there is ground truth: it has no costs. Of a view: r the whole
image, c native-size crops, u crops that are not resized. `flagged` is the share of samples with a flag of any kind."""

STAGE_SCHEMAS: dict[Stage, pa.Schema] = {"captions": CAPTIONS_SCHEMA, "quality": QUALITY_SCHEMA}
"""The schemas of the stages that write tables."""


def encode_table(rows: Sequence[dict[str, Any]], schema: pa.Schema, metadata: dict[str, str] | None = None) -> bytes:
    """Rows as a Parquet file (zstd).

    Raises ValueError for a column that the schema does not have, a missing or null value where the schema wants one, or
    a value of the wrong type.
    """
    table = table_of(rows, schema)
    if metadata:
        table = table.replace_schema_metadata({**schema.metadata, **metadata})
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue()


class TableWriter:
    """Writes one Parquet file from rows that come in pieces; holds one row group at a time. Use as a context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._pending: list[pa.Table] = []
        self.rows = 0
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

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
    """Rows as a table in the form of `schema`. Raises ValueError as `encode_table` does."""
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


def decode_table(source: bytes | Path, schema: pa.Schema, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file in the form of `schema`: added columns are null where the file is older. `columns`: only these.

    Raises ShardError, naming `name`, if it is no Parquet file or lacks a column that must be there.
    """
    try:
        file = pq.ParquetFile(BytesIO(source) if isinstance(source, bytes) else source)
        wanted = schema if columns is None else pa.schema([schema.field(each) for each in columns])
        known = [field.name for field in wanted if field.name in file.schema_arrow.names]
        return _in_form(file.read(columns=known), wanted, name)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, error) from error


def rows_at(source: bytes | Path, schema: pa.Schema, name: str, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a Parquet file at `positions`, which must ascend; one row group is read at a time.

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
