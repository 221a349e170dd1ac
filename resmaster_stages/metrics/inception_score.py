"""Inception score (Salimans et al. 2016): are images sharp for a classifier, and different from each other?

The score is exp of the mean Kullback-Leibler divergence of each image's class probabilities from their marginal. It
lies between 1 (all images alike, or no image certain) and the number of classes. A score means nothing without the name
of the classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy


def inception_score(probabilities: NDArray[Any], splits: int = 10) -> tuple[float, float]:
    """(mean, population standard deviation) over `splits` consecutive parts of probabilities [N, K], float64.

    Few images per split bias the score downwards, so compare equal counts and splits only. Raises ValueError for rows
    that do not add up to 1 (within 1e-2, for half precision) or more splits than rows.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or not p.size:
        raise ValueError(f"probabilities of shape [N, K] expected, got {p.shape}")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits {splits}: give a number from 1 to the {len(p)} images")
    if p.min() < 0 or not np.allclose(p.sum(axis=1), 1, atol=1e-2):
        raise ValueError("each row of probabilities must be non-negative and add up to 1")
    p = p / p.sum(axis=1, keepdims=True)
    scores = []
    for part in np.array_split(p, splits):
        marginal = part.mean(axis=0)
        divergence = xlogy(part, part).sum() / len(part) - xlogy(marginal, marginal).sum()
        scores.append(np.exp(max(0.0, divergence)))
    return float(np.mean(scores)), float(np.std(scores))
