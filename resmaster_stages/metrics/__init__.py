"""Metrics, one file per metric. `METRICS` lists those that the quality stage computes, in the order of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics import (
    aesthetic,
    agreement,
    clip_score,
    detail,
    exposure,
    phash,
    safety,
    seam,
    watermark,
    worst,
)
from resmaster_stages.metrics.metric import Column, Metric

METRICS: list[Metric] = [
    clip_score.METRIC,
    agreement.METRIC,
    detail.METRIC,
    seam.METRIC,
    worst.METRIC,
    exposure.METRIC,
    aesthetic.METRIC,
    safety.METRIC,
    watermark.METRIC,
    phash.METRIC,
]
"""Read this list when you need it, and keep no copy: metrics from outside are appended after this module was
imported."""


def metrics_of(config: QualityConfig | None) -> list[Metric]:
    """The metrics that a dataset asks for. None: all."""
    return [metric for metric in METRICS if config is None or metric.asked(config)]


def metric_columns(config: QualityConfig | None = None) -> list[Column]:
    """The columns of the metrics that a dataset asks for, in order. None: of all metrics."""
    return [column for metric in metrics_of(config) for column in metric.columns]


def shown_columns() -> list[Column]:
    """The columns that pages show for every sample."""
    return [column for column in metric_columns() if column.label]


def filled_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """All columns, without those of metrics that not every dataset has and that have no value in `rows`."""
    always = metric_columns(QualityConfig())
    return [
        column
        for column in metric_columns()
        if column in always or any(row.get(column.name) is not None for row in rows)
    ]
