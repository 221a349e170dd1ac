"""Metrics, one file per metric. `METRICS` lists those that the quality stage computes, in the order of its table."""

from __future__ import annotations

from resmaster_stages.metrics import agreement, clip_score, detail, exposure, phash, seam, worst
from resmaster_stages.metrics.metric import Column, Metric

METRICS: list[Metric] = [
    clip_score.METRIC,
    agreement.METRIC,
    detail.METRIC,
    seam.METRIC,
    worst.METRIC,
    exposure.METRIC,
    phash.METRIC,
]
"""Read this list when you need it, and keep no copy: metrics from outside are appended after this module was
imported."""


def metric_columns() -> list[Column]:
    """The columns of all metrics, in order."""
    return [column for metric in METRICS for column in metric.columns]


def shown_columns() -> list[Column]:
    """The columns that pages show for every sample."""
    return [column for column in metric_columns() if column.label]
