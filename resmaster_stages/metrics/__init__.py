"""One file per metric. `METRICS` lists what the quality stage measures of every sample, in the order of its table."""

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
"""Read it when you need it: a metric from outside is appended after this module was imported."""


def metric_columns() -> list[Column]:
    """The columns of all metrics, in order."""
    return [column for metric in METRICS for column in metric.columns]


def shown_columns() -> list[Column]:
    """Those that pages show of every sample."""
    return [column for column in metric_columns() if column.label]
