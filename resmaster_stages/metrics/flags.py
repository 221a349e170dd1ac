"""What is wrong with an image by its metrics: flags, and one number for sorting the worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from resmaster_stages.config.dataset import QualityConfig

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
