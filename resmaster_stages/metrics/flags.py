"""Flags that say what is wrong with an image by its metrics, and one number that sorts the worst images first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.metric import Flag

UNKNOWN_BADNESS = 0.5
"""What a column without a value adds to badness."""


def known_flags(config: QualityConfig | None = None) -> dict[str, Flag]:
    """Every flag that a dataset may have, by its name, in the order of the metrics' columns. None: of all datasets. A
    sample's flags are in this order."""
    return {column.flag.name: column.flag for column in metric_columns(config) if column.flag}


def flags(row: Mapping[str, Any], config: QualityConfig) -> list[str]:
    """Names of the flags that a row raises by the thresholds of `config`, in the order of `known_flags`."""
    return [
        column.flag.name
        for column in metric_columns(config)
        if column.flag and column.flag.raised(row[column.name], config)
    ]


def badness_columns() -> list[str]:
    """The columns of the manifest that `badness` reads."""
    return [*(column.name for column in metric_columns() if column.badness), "flags"]


def badness(row: Mapping[str, Any]) -> float:
    """One number to sort the worst samples first. Greater is worse, and 0 is about perfect.

    Every flag adds its own badness (10 for `blank`, 2 for the others). Every column with a range of badness adds a
    number from 0 (good) to 1 (bad), and `UNKNOWN_BADNESS` if it has no value.
    """
    known = known_flags()
    score = sum(known[flag].badness if flag in known else Flag.badness for flag in row.get("flags") or ())
    for column in metric_columns():
        if column.badness:
            score += _share(row.get(column.name), *column.badness)
    return score


def _share(value: float | None, good: float, bad: float) -> float:
    """Where a value lies between good (0) and bad (1)."""
    if value is None:
        return UNKNOWN_BADNESS
    return min(1.0, max(0.0, (value - good) / (bad - good))) if math.isfinite(value) else 1.0
