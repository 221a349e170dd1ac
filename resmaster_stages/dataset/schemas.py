"""The columns of every table of a dataset.

The metrics define most columns of the quality table. Its schema and the manifest's schema are functions, so that they
hold every metric that is registered when they are called.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics import metric_columns


def table_schema(table: str, fields: Sequence[tuple[str, pa.DataType | str, bool]]) -> pa.Schema:
    """A schema from (name, type, nullable) triples, with the table's name and version as metadata."""
    columns = [pa.field(name, kind, nullable=nullable) for name, kind, nullable in fields]
    return pa.schema(columns, metadata={"table": table, "schema_version": "1"})


CAPTIONS_SCHEMA = table_schema(
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
"""One row per patch. `grid` is "HxW/window/stride" in px, with "/horizontal", "/vertical" or "/both" at the end if the
image wraps. A box that ends beyond a border that wraps continues at the opposite border. `status` is ok, replaced (a
neighbour's caption, which fits better), fallback or empty (the global prompt). `fit` says how well the caption fits the
patch, and is null if that was not checked."""


RECAPTIONS_SCHEMA = table_schema(
    "recaptions",
    [
        ("key", pa.string(), False),
        ("style", pa.string(), False),
        ("caption", pa.string(), True),
        ("model", pa.string(), False),
        ("revision", pa.string(), False),
        ("status", pa.string(), False),
    ],
)
"""One row per finished image and style. `status` is ok, or empty if the captioner said nothing; then `caption` is
null."""


def quality_schema(config: QualityConfig | None = None) -> pa.Schema:
    """One row per image. config: only the columns of metrics that a dataset asks for; None: all that may be there."""
    return table_schema(
        "quality",
        [
            ("key", pa.string(), False),
            ("width", pa.int32(), False),
            ("height", pa.int32(), False),
            *[(column.name, pa.type_for_alias(column.kind), True) for column in metric_columns(config)],
            ("flags", pa.list_(pa.string()), False),
        ],
    )


PLAN_SCHEMA = table_schema(
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
"""One row per planned sample. `index` counts through the whole dataset; `height` and `width` are in low-res px."""


REJECTED_SCHEMA = table_schema(
    "rejected",
    [("source", pa.string(), False), ("text", pa.string(), False), ("reason", pa.string(), False)],
)
"""One row per rejected input: its source, the beginning of its text, and the reason."""


DUPLICATES_SCHEMA = table_schema(
    "duplicates",
    [("source", pa.string(), False), ("key", pa.string(), False), ("first", pa.string(), True)],
)
"""One row per input that equals an earlier one: its source, the key of their sample (of replica 0), and the earlier
image (null for prompts)."""


LEDGER_SCHEMA = table_schema(
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
"""One row per failed sample and attempt; `attempt_number` counts the sample's failures in this stage from 1
under one configuration."""


CURATION_SCHEMA = table_schema(
    "curation",
    [
        ("key", pa.string(), False),
        ("verdict", pa.string(), False),
        ("rating", pa.int8(), True),
        ("reason", pa.string(), False),
        ("who", pa.string(), False),
        ("when", pa.string(), False),
        ("take", pa.int32(), False),
    ],
)
"""One row per sample about which somebody chose: `verdict` is kept, rejected or none, `rating` is 1 to 5, `when` is the
time in UTC, and `take` counts how often the sample had been made anew."""

RECAPTIONS = pa.list_(pa.struct([pa.field("style", pa.string(), nullable=False), pa.field("caption", pa.string())]))
"""The manifest's captions of an image by style, sorted by style."""


def manifest_schema(config: QualityConfig | None = None) -> pa.Schema:
    """One row per finished sample. config: as in `quality_schema`.

    `near_duplicate_of` is the key of the first sample that looks nearly the same. It is null if there is none.
    Objects are relative to the dataset. Offset and bytes are those of the image file in the tar, so that one range
    request fetches the file. `height` and `width` are those of the high-res image.
    """
    return table_schema(
        "manifest",
        [
            ("key", pa.string(), False),
            ("index", pa.int64(), False),
            ("shard", pa.int32(), False),
            ("replica", pa.int32(), False),
            ("take", pa.int32(), True),
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
            ("recaptions_object", pa.string(), True),
            ("recaptions", RECAPTIONS, True),
            *[(field.name, field.type, field.nullable) for field in quality_schema(config) if field.name != "key"],
            ("near_duplicate_of", pa.string(), True),
            ("verdict", pa.string(), True),
            ("rating", pa.int8(), True),
            ("low_res_hash", pa.string(), False),
            ("captions_hash", pa.string(), True),
            ("high_res_hash", pa.string(), False),
            ("quality_hash", pa.string(), False),
            ("recaptions_hash", pa.string(), True),
        ],
    )
