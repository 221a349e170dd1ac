"""Stage 5: low-res + high-res image -> one row of metrics and flags per sample, and feature vectors if asked for.

Flags never delete: what to do with a flagged sample is decided by whoever reads the table. Knows nothing about storage.

Invariants:
- Every metric is computed from the sample alone. Only the flag `near_duplicate` looks at the samples before it in the shard.
- Numbers are finite; `clip_score` is None where there is no CLIP model or no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.diffusion.views import Box, view_grid
from resmaster_stages.errors import SampleError
from resmaster_stages.metrics.agreement import agreement
from resmaster_stages.metrics.detail import detail_energy
from resmaster_stages.metrics.exposure import exposure
from resmaster_stages.metrics.features import picture_features
from resmaster_stages.metrics.flags import flags
from resmaster_stages.metrics.phash import phash
from resmaster_stages.metrics.seam import seam_ratio, seam_worst
from resmaster_stages.metrics.worst import worst_places
from resmaster_stages.models.geometry import geometry_of

if TYPE_CHECKING:
    from resmaster_stages.metrics.features import FeatureExtractor


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """One Output per sample, in order, with one row each: the quality table without the key.

    Raises ConfigError if the CLIP model cannot be loaded; a sample's own trouble is its Output's error.
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
    geometry = geometry_of(config.model)
    seen: set[str] = set()
    for sample in samples:
        try:
            if sample.low_res is None or sample.high_res is None:
                raise SampleError(f"{sample.key}: low-res or high-res image is missing")
            low, high = sample.low_res.open(), sample.high_res.open()
            boxes = view_grid(geometry, high.height, high.width, config.upscale.stride).pixel_boxes
            row = measure(low, high, boxes)
            row["clip_score"] = scorer.scores([high], [sample.prompt])[0] if scorer and sample.prompt else None
            row["flags"] = flags(row, quality)
            if "blank" not in row["flags"]:
                if row["phash"] in seen:
                    row["flags"].append("near_duplicate")
                seen.add(row["phash"])
            arrays: dict[str, NDArray[Any]] = {}
            if extractor is not None:
                for name, picture in (("high_res", high), ("low_res", low)):
                    found = picture_features(extractor, picture, sample.key, geometry.native_px)
                    arrays |= {f"{name}.{view}": values for view, values in found.items()}
            yield Output(key=sample.key, rows=[row], arrays=arrays)
        except SampleError as error:
            yield Output(key=sample.key, error=error)


def measure(low: Image.Image, high: Image.Image, boxes: Sequence[Box]) -> dict[str, Any]:
    """The metrics of one pair that need no model. `boxes`: the views, half-open (y0, x0, y1, x1), in px of `high`."""
    psnr, ssim = agreement(high, low)
    light, worst = exposure(high), worst_places(high, low)
    return {
        "width": high.width,
        "height": high.height,
        "agreement_psnr": psnr,
        "agreement_ssim": ssim,
        "detail_energy": detail_energy(high, low.height, low.width),
        "seam": seam_ratio(high, boxes),
        "seam_worst": seam_worst(high, low, boxes),
        "lost_worst": worst.lost,
        "added_worst": worst.added,
        "colour_worst": worst.colour,
        "clipped": light.clipped,
        "phash": phash(high),
        "luminance_mean": light.luminance_mean,
        "luminance_std": light.luminance_std,
    }
