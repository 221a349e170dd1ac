"""Kernel distance of two sets of feature vectors (KID: Bińkowski et al. 2018): polynomial MMD^2, unbiased at any count.

Crops of one image are not independent, so crops are given as [images, crops, D]. Pairs within an image are left out,
and the subsets for the confidence interval are drawn from whole images. In [N, D] every row is an image of its own.

Invariants:
- Everything is float64, and the same features give the same estimates.
- The estimate is unbiased, so it may be slightly negative if the sets are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resmaster_stages.metrics.fid import Floats

SUBSETS = 100
SUBSET_IMAGES = 1000
"""Images drawn from each side, without replacement, per subset. Fewer if a side has less than twice as many images."""
BLOCK = 2048
"""Rows of a kernel matrix that are in memory at a time."""
Z95 = 1.959963984540054
"""Half width, in standard errors, of a 95 % interval of a normal distribution."""


@dataclass(frozen=True)
class KidEstimate:
    """Polynomial MMD^2 of two sets; multiply by 1000 for the usual way of printing it."""

    value: float
    """Estimate over all samples."""
    low: float | None
    """Lower end of the 95 % confidence interval of `value`; None for fewer than 3 images on a side."""
    high: float | None
    """Upper end."""


def kid(x: NDArray[Any], y: NDArray[Any]) -> KidEstimate:
    """KID between features `x` and `y`, each [N, D] or [images, crops, D].

    The interval is `value` -/+ 1.96 standard errors by the delete-d jackknife (Shao, Wu 1989): with subsets of m out of
    n images, the variance of `value` is m / (n - m) times that of the subset estimates. n is the smaller side, which
    makes the interval too wide rather than too narrow. Raises ValueError for fewer than 2 images on a side.
    """
    a, b = _by_image(x), _by_image(y)
    if a.shape[2] != b.shape[2]:
        raise ValueError(f"features of one dimension expected, got {a.shape[2]} and {b.shape[2]}")
    n = min(len(a), len(b))
    if n < 2:
        raise ValueError(f"KID needs at least 2 images on each side, got {len(a)} and {len(b)}")
    value = mmd2(a, b)
    if n < 3:
        return KidEstimate(value, None, None)
    size = min(SUBSET_IMAGES, max(2, n // 2))
    rng = np.random.default_rng(0)
    estimates = [
        mmd2(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)])
        for _ in range(SUBSETS)
    ]
    half = Z95 * float(np.std(estimates, ddof=1)) * (size / (n - size)) ** 0.5
    return KidEstimate(value, value - half, value + half)


def mmd2(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Unbiased MMD^2 with the kernel (x . y / D + 1)^3 between [N, D] or [images, crops, D]."""
    a, b = _by_image(x), _by_image(y)
    rows_a, rows_b = a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2])
    return _mean_within(a) + _mean_within(b) - 2 * _kernel_sum(rows_a, rows_b) / (len(rows_a) * len(rows_b))


def _by_image(features: NDArray[Any]) -> Floats:
    """[images, crops, D], float64."""
    values = np.asarray(features, dtype=np.float64)
    if values.ndim == 2:
        values = values[:, None, :]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"features of shape [N, D] or [images, crops, D] expected, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("features must be finite")
    return values


def _kernel_sum(x: Floats, y: Floats) -> float:
    starts = range(0, len(x), BLOCK)
    return float(sum(((x[start : start + BLOCK] @ y.T / x.shape[1] + 1) ** 3).sum() for start in starts))


def _mean_within(images: Floats) -> float:
    """Mean kernel over all pairs of rows from different images."""
    count, crops, dimension = images.shape
    rows = images.reshape(-1, dimension)
    same_image = float(((np.einsum("icd,ijd->icj", images, images, optimize=True) / dimension + 1) ** 3).sum())
    return (_kernel_sum(rows, rows) - same_image) / (count * (count - 1) * crops**2)
