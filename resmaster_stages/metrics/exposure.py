"""Exposure: how bright an image is, how much that varies, and how much of it is lost in black or white."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, luminance, rgb
from resmaster_stages.metrics.metric import Column, Flag, Metric


class Exposure(NamedTuple):
    """`clipped`: share (0 to 1) of pixels; `luminance_mean` and `luminance_std`: luma, 0 to 255."""

    clipped: float
    luminance_mean: float
    luminance_std: float


def exposure(image: Image.Image | Array) -> Exposure:
    """The share of pixels that are pure black (0, 0, 0) or pure white (255, 255, 255), and the mean and standard
    deviation of the luma."""
    values = rgb(image)
    clipped = (values <= 0).all(axis=2) | (values >= 255).all(axis=2)
    y = luminance(values)
    return Exposure(float(clipped.mean()), float(y.mean(dtype=np.float64)), float(y.std(dtype=np.float64)))


METRIC = Metric(
    compute=lambda pair: exposure(pair.high_rgb),
    columns=(
        Column(
            "clipped",
            "share of pure black and white pixels",
            label="clipped",
            form="{:.1%}",
            better="↓",
            flag=Flag("clipped", "much pure black or white", above="max_clipped"),
            badness=(0.0, 1.0),
        ),
        Column("luminance_mean", "mean of the luma, in grey levels"),
        Column(
            "luminance_std",
            "standard deviation of the luma, in grey levels",
            flag=Flag("blank", "one colour all over", below=1.0, badness=10.0),
        ),
    ),
)
