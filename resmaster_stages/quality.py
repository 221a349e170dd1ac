"""Stage 5: low-res + high-res image -> one row of metrics and flags per sample, and feature vectors if asked for.

Flags never delete a sample: the readers of the table decide what to do with flagged samples. This module does not
access storage.

Invariants:
- Every metric and flag is computed from the sample alone. (`near_duplicate` needs all samples, so `publish.manifest`
  adds it.)
- Numbers are finite, or None if a metric has nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from resmaster_stages.config.dataset import SCORES, DatasetConfig, QualityConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import SampleError
from resmaster_stages.metrics import metrics_of
from resmaster_stages.metrics.features import image_features
from resmaster_stages.metrics.flags import flags
from resmaster_stages.metrics.metric import Pair
from resmaster_stages.metrics.score_models import load_score
from resmaster_stages.models.geometry import geometry_of

if TYPE_CHECKING:
    from resmaster_stages.metrics.features import FeatureExtractor


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Yield one Output per sample, in order, with one row of the quality table, without the key.

    Raises ConfigError if a model cannot be loaded. An error of one sample becomes its Output's error.
    """
    quality = config.quality
    scorer = None
    if quality.clip is not None:
        from resmaster_stages.metrics.clip_score import load_clip

        scorer = load_clip(quality.clip, quality.clip_revision, quality.device)
    extractor: FeatureExtractor | None = None
    if quality.features != "none":
        from resmaster_stages.metrics.features import load_extractor

        extractor = load_extractor(quality)
    score_models = {name: load_score(name, quality) for name in SCORES if getattr(quality, name) is not None}
    geometry = geometry_of(config.model)
    for sample in samples:
        try:
            if sample.low_res is None or sample.high_res is None:
                raise SampleError(f"{sample.key}: low-res or high-res image is missing")
            low, high = sample.low_res.open(), sample.high_res.open()
            upscale = config.upscale
            boxes = view_grid(geometry, high.height, high.width, upscale.view_stride, upscale.wraps).pixel_boxes
            row = measure(Pair(low, high, boxes, sample.prompt, scorer, score_models), quality)
            row["flags"] = flags(row, quality)
            arrays: dict[str, NDArray[Any]] = {}
            if extractor is not None:
                for name, image in (("high_res", high), ("low_res", low)):
                    found = image_features(extractor, image, sample.key, geometry.native_px)
                    arrays |= {f"{name}.{view}": values for view, values in found.items()}
            yield Output(key=sample.key, rows=[row], arrays=arrays)
        except SampleError as error:
            yield Output(key=sample.key, error=error)


def measure(pair: Pair, config: QualityConfig | None = None) -> dict[str, Any]:
    """The row of the quality table for one sample, without key and flags. config: default: that of a new dataset."""
    row: dict[str, Any] = {"width": pair.high.width, "height": pair.high.height}
    for metric in metrics_of(config or QualityConfig()):
        row |= metric.measure(pair)
    return row
