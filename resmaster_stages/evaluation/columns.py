"""The columns of the comparison's table: their contents, and how the comparison's page shows them.

The columns of the metrics come from `resmaster_stages.metrics`. The columns of whole sets, pairs and costs are here.
"""

from __future__ import annotations

import pyarrow as pa

from resmaster_stages.dataset.schemas import table_schema
from resmaster_stages.evaluation.set_metrics import VIEWS
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.metric import Column

FACTS = {
    "scale": pa.string(),
    "method": pa.string(),
    "dataset": pa.string(),
    "features": pa.string(),
    "reference": pa.string(),
    "reference_samples": pa.int64(),
    "samples": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
}
"""Columns that say what a row is about -> type."""

LOOKS = {"r": "whole image resized", "c": "10 native-size crops resized", "u": "10 crops not resized"}
"""View -> the part of the image that is compared."""


def _of_sets(view: str) -> list[Column]:
    look = LOOKS[view]
    return [
        Column(
            f"fid_{view}",
            f"Fréchet distance of features, {look}; biased at small counts, so compare equal counts only",
            label=f"FID {view}",
            better="↓",
        ),
        Column(
            f"kid_{view}",
            f"kernel distance of features with its 95 % interval, {look}",
            label=f"KID {view}",
            form="{:.4f}",
            better="↓",
        ),
        Column(f"kid_{view}_low", "lower end of the interval"),
        Column(f"kid_{view}_high", "upper end of the interval"),
        Column(f"is_{view}", f"Inception score, {look}", label=f"IS {view}", better="↑"),
    ]


OF_SETS = [column for view in VIEWS for column in _of_sets(view)]

OF_TRUTH = Column(
    "perceptual_distance",
    "perceptual distance from the true enlargement",
    label="distance",
    form="{:.3f}",
    better="↓",
)

OF_SAMPLES = [
    Column("flagged", "share of images with a flag of any kind", label="flagged", better="↓"),
    Column(
        "repeat_rate",
        "share of images that show more of a kind than the prompt asks for",
        label="repeats",
        better="↓",
    ),
    Column("repeat_surplus", "objects too many per image"),
]

COSTS = [
    Column("unet_calls", "forward passes per image", label="UNet calls", form="{:.0f}"),
    Column("unet_rows", "rows of these passes per image"),
    Column(
        "unet_native_rows",
        "evaluations per image in native-size views, guidance included",
        label="UNet views",
        form="{:.0f}",
    ),
    Column("seconds_captions", "seconds of the captions stage per image"),
    Column(
        "seconds_high_res",
        "seconds of the high-res stage per image, loading of models included",
        label="s/image",
        form="{:.1f}",
    ),
]


def compared_metrics() -> list[Column]:
    """The columns of the quality table whose means a comparison shows."""
    return [column for column in metric_columns() if column.compared]


def measures() -> list[Column]:
    """All columns of the comparison's table except `FACTS`, in order."""
    return [*OF_SETS, *compared_metrics(), OF_TRUTH, *OF_SAMPLES, *COSTS]


def compare_schema() -> pa.Schema:
    """The table's schema. It has one row per method and scale and, with ground truth, one of drawn images without
    costs."""
    facts = [(name, kind, False) for name, kind in FACTS.items()]
    return table_schema(
        "compare", [*facts, *((column.name, pa.type_for_alias(column.kind), True) for column in measures())]
    )
