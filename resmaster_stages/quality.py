"""Stage 5: low-res + high-res image -> one row of metrics and flags per sample, and feature vectors if asked for.

Flags never delete: what to do with a flagged sample is decided by whoever reads the table. Knows nothing about storage.

Invariants:
- Every metric is computed from the sample alone. Only the flag `near_duplicate` looks at the samples before it in the shard.
- Numbers are finite; `clip_score` is None where there is no CLIP model or no prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config import DatasetConfig, QualityConfig
from resmaster_stages.diffusion.views import Box, view_grid
from resmaster_stages.errors import SampleError
from resmaster_stages.metrics.agreement import agreement
from resmaster_stages.metrics.crops import crop_boxes, crops
from resmaster_stages.metrics.detail import detail_energy
from resmaster_stages.metrics.exposure import exposure
from resmaster_stages.metrics.phash import phash
from resmaster_stages.metrics.seam import seam_ratio, seam_worst
from resmaster_stages.metrics.worst import worst_places
from resmaster_stages.models.geometry import latent_factor, native_px
from resmaster_stages.storage.arrays import Arrays
from resmaster_stages.storage.dataset import Output, Sample

if TYPE_CHECKING:
    from resmaster_stages.metrics.features import FeatureExtractor

FLAGS: dict[str, str] = {
    "structure": "the down-scaled result disagrees with the low-res image",
    "seam": "steps in the picture where views end",
    "border": "a hard step along the border of one view",
    "lost": "contours of the low-res image are missing in one place",
    "added": "contours that the low-res image has not, in one place",
    "colour": "another colour than the low-res image, in one place or all over",
    "clipped": "much pure black or white",
    "blank": "one colour all over",
    "near_duplicate": "looks the same as an earlier sample of its shard",
}
"""Every flag and what it says."""

WORST_RANGES = {"seam_worst": 20.0, "lost_worst": 5.0, "added_worst": 5.0, "colour_worst": 25.0}
"""Column of a worst place -> what is as bad as can be, about three times the threshold of its flag."""

BLANK_STD = 1.0
"""Standard deviation of the luma, in grey levels, below which a picture is blank."""


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
    native, factor = native_px(config.model), latent_factor(config.model)
    seen: set[str] = set()
    for sample in samples:
        try:
            if sample.low_res is None or sample.high_res is None:
                raise SampleError(f"{sample.key}: low-res or high-res image is missing")
            low, high = sample.low_res.open(), sample.high_res.open()
            boxes = view_grid(high.height, high.width, native, config.upscale.stride, factor).pixel_boxes
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
                    found = picture_features(extractor, picture, sample.key, native)
                    arrays |= {f"{name}.{view}": values for view, values in found.items()}
            yield Output(key=sample.key, rows=[row], arrays=arrays)
        except SampleError as error:
            yield Output(key=sample.key, error=error)


def picture_features(extractor: FeatureExtractor, picture: Image.Image, key: str, native: int) -> Arrays:
    """What an extractor sees of one picture, float16, by view (and `{view}.probabilities` where there are classes):

    - `r` [D]: the whole picture, resized to the extractor's input;
    - `c` [10, D]: crops of the model's native size (`native` px), resized;
    - `u` [10, D]: crops of the extractor's input size, not resized; absent where that is the native size, as it is `c` then.

    Crops lie where `key` says. A picture smaller than a crop gives squares of its shorter side, resized.
    Raises SampleError for features beyond half precision.
    """
    boxes = {
        view: crop_boxes(key, picture.height, picture.width, size)
        for view, size in {"c": native, "u": extractor.input_px}.items()
        if view == "c" or size != native
    }
    distinct = list(dict.fromkeys(box for found in boxes.values() for box in found))
    found = extractor.extract([picture, *crops(picture, distinct)])
    rows: dict[str, Any] = {"r": 0, **{view: [1 + distinct.index(box) for box in each] for view, each in boxes.items()}}
    arrays: dict[str, NDArray[Any]] = {}
    with np.errstate(over="ignore"):
        for view, at in rows.items():
            arrays[view] = found.features[at].astype(np.float16)
            if found.probabilities is not None:
                arrays[f"{view}.probabilities"] = found.probabilities[at].astype(np.float16)
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise SampleError(f"{key}: features beyond half precision or not finite; choose another quality.features")
    return arrays


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


def flags(row: Mapping[str, Any], config: QualityConfig) -> list[str]:
    """Names of what is wrong with a row by the thresholds of `config`, in the order of `FLAGS`."""
    checks = {
        "structure": row["agreement_psnr"] < config.min_agreement_psnr,
        "seam": row["seam"] > config.max_seam,
        "border": row["seam_worst"] > config.max_seam_worst,
        "lost": row["lost_worst"] > config.max_lost_worst,
        "added": row["added_worst"] > config.max_added_worst,
        "colour": row["colour_worst"] > config.max_colour_worst,
        "clipped": row["clipped"] > config.max_clipped,
        "blank": row["luminance_std"] < BLANK_STD,
    }
    return [name for name, failed in checks.items() if failed]


def badness(row: Mapping[str, Any]) -> float:
    """One number by which to look at the worst samples first; greater is worse, 0 is about perfect.

    10 for `blank` and 2 for every other flag, plus each of these from 0 (good) to 1 (bad): the agreement's PSNR from 40
    dB down to 0, the seam ratio from 1 up to 2, each worst place from 0 up to its `WORST_RANGES`, the share of clipped
    pixels, the CLIP score from 100 down to 0. A worst place or CLIP score that there is none of counts 0.5.
    """

    def unit(value: float) -> float:
        return min(1.0, max(0.0, value)) if math.isfinite(value) else 1.0

    score = sum(10.0 if flag == "blank" else 2.0 for flag in row.get("flags") or ())
    score += unit((40.0 - row["agreement_psnr"]) / 40.0) + unit(row["seam"] - 1.0) + unit(row["clipped"])
    for name, most in WORST_RANGES.items():
        value = row.get(name)
        score += 0.5 if value is None else unit(value / most)
    clip = row.get("clip_score")
    return score + (0.5 if clip is None else unit(1.0 - clip / 100.0))
