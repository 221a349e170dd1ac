"""The columns of every table of a dataset."""

from __future__ import annotations

import pyarrow as pa


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


STAGE_SCHEMAS: dict[str, pa.Schema] = {"captions": CAPTIONS_SCHEMA, "quality": QUALITY_SCHEMA}
"""The schemas of the stages that write tables."""
