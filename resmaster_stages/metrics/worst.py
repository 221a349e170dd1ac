"""The worst place of a high-res image compared with its low-res image: structure lost or added, colour shifted.

`agreement` averages over the image, so one object out of many can vanish unnoticed. The numbers here are those of the
window in which the two images differ most. Both images are first averaged over areas (box filter) to one small size. So
detail finer than the low-res image is free to differ, and an image of 4096 px is judged by the same numbers as one of
512 px. No model is used: structure is measured by contours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, rgb
from resmaster_stages.metrics.metric import Column, Flag, Metric
from resmaster_stages.metrics.oklab import oklab
from resmaster_stages.metrics.resize import resize

COMPARED_PX = 128
"""The largest shorter side at which the images are compared. The smallest object that is noticed has 3 to 12 of these
px, depending on its contrast."""
SOFT_PX = 1.0
"""Sigma of the Gaussian blur of both images before their contours are compared, so that rounding and grain do not count
as contours."""
SLACK_PX = 2
"""How far a contour of one image may lie from the same contour of the other image."""
WINDOW = 1 / 8
"""Side of the window whose mean counts, as a fraction of the image's shorter side."""


class Worst(NamedTuple):
    """`lost` and `added`: Oklab times 100 per px; `colour`: Oklab times 100. 0 for equal images."""

    lost: float
    added: float
    colour: float


def worst_places(high_res: Image.Image | Array, low_res: Image.Image | Array) -> Worst:
    """What the worst windows of `high_res` have lost, added and shifted compared with `low_res`."""
    reference = rgb(low_res)
    height, width = reference.shape[:2]
    shrink = min(1.0, COMPARED_PX / min(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    was, now = oklab(resize(reference, *size, "box")), oklab(resize(high_res, *size, "box"))
    side = max(1, round(min(size) * WINDOW))
    before, after = contours(was), contours(now)
    return Worst(
        lost=_worst(before - _reach(after), side),
        added=_worst(after - _reach(before), side),
        colour=float(np.linalg.norm(_soft(now - was, side / 2), axis=2).max()),
    )


def contours(lab: Array) -> Array:
    """Length of the gradient of a softened image [H, W, 3] over its three channels: [H, W], per px."""
    soft = _soft(lab, SOFT_PX)
    steps = [np.gradient(soft, axis=axis) if soft.shape[axis] > 1 else np.zeros_like(soft) for axis in (0, 1)]
    return np.sqrt(sum((step**2).sum(axis=2) for step in steps))


def _soft(lab: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(lab, (sigma, sigma, 0), mode="reflect")  # `nearest` would make the outermost line count most


def _reach(values: Array) -> Array:
    """The greatest value within `SLACK_PX` of each place."""
    from scipy.ndimage import maximum_filter

    return maximum_filter(values, 2 * SLACK_PX + 1, mode="nearest")


def _worst(excess: Array, side: int) -> float:
    from scipy.ndimage import uniform_filter

    return float(uniform_filter(np.maximum(excess, 0), side, mode="constant").max())


METRIC = Metric(
    compute=lambda pair: worst_places(pair.high_rgb, pair.low_rgb),
    columns=(
        Column(
            "lost_worst",
            "contours of the low-res image that are missing in the worst place",
            label="lost",
            better="↓",
            flag=Flag("lost", "contours of the low-res image are missing in one place", above="max_lost_worst"),
            badness=(0.0, 5.0),
        ),
        Column(
            "added_worst",
            "contours that the low-res image has not, in the worst place",
            label="added",
            better="↓",
            flag=Flag("added", "contours that the low-res image has not, in one place", above="max_added_worst"),
            badness=(0.0, 5.0),
        ),
        Column(
            "colour_worst",
            "difference of colour in the worst place; about 2 can just be seen",
            label="colour",
            form="{:.1f}",
            better="↓",
            flag=Flag(
                "colour",
                "another colour than the low-res image, in one place or all over",
                above="max_colour_worst",
            ),
            badness=(0.0, 25.0),
        ),
    ),
)
"""A worst place has the full badness of 1 from about three times the threshold of its flag."""
