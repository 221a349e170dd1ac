"""What is wrong with an image by its metrics: flags, and one number for sorting the worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.metrics import metric_columns
from resmaster_stages.metrics.metric import Flag

UNKNOWN_BADNESS = 0.5
"""What a measure adds to badness where it has no value."""


def known_flags() -> dict[str, Flag]:
    """Every flag by its name, in the order in which samples have them."""
    return {column.flag.name: column.flag for column in metric_columns() if column.flag}


def flags(row: Mapping[str, Any], config: QualityConfig) -> list[str]:
    """Names of what is wrong with a row by the thresholds of `config`, in the order of `known_flags`."""
    return [
        column.flag.name for column in metric_columns() if column.flag and column.flag.raised(row[column.name], config)
    ]


def badness_columns() -> list[str]:
    """The columns of the manifest that `badness` reads."""
    return [*(column.name for column in metric_columns() if column.badness), "flags"]


def badness(row: Mapping[str, Any]) -> float:
    """One number by which to look at the worst samples first; greater is worse, 0 is about perfect.

    Every flag adds its own badness (10 for `blank`, 2 for the others). Every column with a range of badness adds from
    0 (good) to 1 (bad), and `UNKNOWN_BADNESS` where it has no value.
    """
    known = known_flags()
    score = sum(known[flag].badness if flag in known else Flag.badness for flag in row.get("flags") or ())
    for column in metric_columns():
        if column.badness:
            score += _share(row.get(column.name), *column.badness)
    return score


def _share(value: float | None, good: float, bad: float) -> float:
    """How far a value lies from good (0) to bad (1)."""
    if value is None:
        return UNKNOWN_BADNESS
    return min(1.0, max(0.0, (value - good) / (bad - good))) if math.isfinite(value) else 1.0
