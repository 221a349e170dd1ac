"""Fréchet distance of two sets of feature vectors (FID: Heusel et al. 2017), from sums that can be streamed and merged.

This module does not deal with images or networks. Features come from `resmaster_stages.metrics.features`.

Invariants:
- Everything is float64. Merging gives the statistics of the union in any order, up to rounding.
- The distance is symmetric and never negative. It is biased upwards for few samples, so compare equal counts only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and scatter of feature vectors, which is all that the Fréchet distance needs."""

    n: int
    mean: Floats
    """[D]"""
    scatter: Floats
    """[D, D]: sum of the outer products of deviations from the mean."""

    @classmethod
    def of(cls, features: NDArray[Any]) -> FeatureStatistics:
        """Statistics of features [N, D], or [images, crops, D] in which every crop counts as a vector.

        Raises ValueError if features are not finite.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim not in (2, 3) or not values.size:
            raise ValueError(f"features of shape [N, D] or [images, crops, D] expected, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("features must be finite")
        values = values.reshape(-1, values.shape[-1])
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub, LeVeque 1979). Raises ValueError if the dimensions differ."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of one dimension expected, got {self.mean.size} and {other.mean.size}")
        n = self.n + other.n
        apart = other.mean - self.mean
        return FeatureStatistics(
            n,
            self.mean + apart * (other.n / n),
            self.scatter + other.scatter + np.outer(apart, apart) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> Floats:
        """[D, D], unbiased (divided by n - 1, as in numpy.cov). Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)


def merged(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of all parts together. Raises ValueError if there is none."""
    found = list(parts)
    if not found:
        raise ValueError("no statistics to merge")
    return reduce(FeatureStatistics.merge, found)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with A, B the covariances.

    With A = F F^T and B = G G^T from the eigenvalues, the trace of the root is the sum of the singular values of F^T G
    (nuclear norm). Nothing is squared or inverted on the way, so singular covariances (fewer samples than dimensions)
    need no regularisation. The relative error stays near 1e-12, where scipy's sqrtm keeps half of the digits or none.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of one dimension expected, got {a.mean.size} and {b.mean.size}")
    cov_a, cov_b = a.covariance, b.covariance
    cross = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(0.0, float(distance))


def _factor(covariance: Floats) -> Floats:
    """F [D, rank] with F F^T = `covariance`, which is symmetric and positive semi-definite up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])
