"""Metrics of a set of samples against a reference set, from the feature vectors that the quality stage kept.

This module reads commits only. It opens no image and loads no model. `metrics.features.image_features` defines the
views r, c and u.

Invariants:
- A set is given by keys, in any order. The numbers do not depend on the order, except the Inception score's splits.
- Sets of different feature networks are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import committed_arrays
from resmaster_stages.errors import PlanError
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance, merged
from resmaster_stages.metrics.inception_score import inception_score
from resmaster_stages.metrics.kid import kid
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.arrays import Arrays

VIEWS = ("r", "c", "u")
"""Whole image resized, native-size crops resized, and crops not resized."""
ROWS_PER_SPLIT = 100
"""Least number of rows per split of the Inception score, which uses up to 10 splits."""


def iter_features(dataset: Dataset, image: str = "high_res") -> Iterator[dict[str, Arrays]]:
    """Yields, shard by shard in order, key -> view -> features of a dataset's committed high_res or low_res images.

    Raises PlanError if the configuration keeps no features, and ShardError if an object is missing or damaged.
    """
    if dataset.config.quality.features == "none":
        raise PlanError(
            f"{dataset.url}: keeps no features; set quality.features: clip (or inception) and run it again: "
            "only the quality stage is redone"
        )
    prefix = f"{image}."
    for _, receipt in sorted(dataset.commits("quality").read_all().items()):
        yield {
            key: {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
            for key, arrays in committed_arrays(dataset, receipt).items()
        }


def read_features(dataset: Dataset, image: str = "high_res") -> dict[str, Arrays]:
    """The features of all shards of `iter_features`, in the plan's order."""
    return {key: arrays for shard in iter_features(dataset, image) for key, arrays in shard.items()}


def feature_statistics(
    dataset: Dataset, view: str, image: str = "high_res", keys: Collection[str] | None = None
) -> FeatureStatistics:
    """The statistics for FID of one view, over all samples or over `keys`.

    Shards are read one by one, so datasets can be of any size. Raises PlanError like `iter_features`, and if there is
    no sample.
    """
    parts = []
    for shard in iter_features(dataset, image):
        if chosen := [key for key in shard if keys is None or key in keys]:
            values = stacked(shard, chosen)[view]
            parts.append(FeatureStatistics.of(values))
    if not parts:
        raise PlanError(f"{dataset.url}: no features of these samples; run: resmaster repair {quoted(dataset.url)}")
    return merged(parts)


def stacked(features: Mapping[str, Arrays], keys: Iterable[str] | None = None) -> dict[str, NDArray[np.float32]]:
    """View -> features [N, D] or [N, crops, D] of `keys` (default: all). Raises PlanError for a key without
    features."""
    chosen = list(features if keys is None else keys)
    if missing := [key for key in chosen if key not in features]:
        raise PlanError(f"{len(missing)} samples have no features, {missing[0]} first; run: resmaster repair ROOT")
    names = features[chosen[0]].keys() if chosen else ()
    return {name: np.stack([features[key][name] for key in chosen]).astype(np.float32) for name in names}


def compare_sets(
    found: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]], views: Sequence[str] = VIEWS
) -> dict[str, float | None]:
    """`fid_V`, `kid_V`, `kid_V_low`, `kid_V_high` and `is_V` for every view V. None if there are too few samples.

    For FID every crop is a sample. KID's interval is the 95 % interval, by images.
    """
    row: dict[str, float | None] = {}
    for view in views:
        a, b = found.get(view), reference.get(view)
        row |= dict.fromkeys((f"fid_{view}", f"kid_{view}", f"kid_{view}_low", f"kid_{view}_high", f"is_{view}"))
        if a is not None and b is not None and min(len(a), len(b)) >= 2:
            estimate = kid(a, b)
            row[f"fid_{view}"] = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
            row[f"kid_{view}"] = estimate.value
            row[f"kid_{view}_low"], row[f"kid_{view}_high"] = estimate.low, estimate.high
        probabilities = found.get(f"{view}.probabilities")
        if probabilities is not None and len(probabilities):
            rows = probabilities.reshape(-1, probabilities.shape[-1])
            row[f"is_{view}"] = inception_score(rows, max(1, min(10, len(rows) // ROWS_PER_SPLIT)))[0]
    return row
