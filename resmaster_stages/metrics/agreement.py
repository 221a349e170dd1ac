"""Agreement of a high-res image with its low-res image: PSNR and SSIM of the down-scaled result. Did structure survive?

The result is averaged over areas (box filter) to the low-res size. For whole factors, that is exactly the mean of each
block of pixels. Detail above the low-res image's resolution is free to differ.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, luminance, rgb
from resmaster_stages.metrics.metric import Column, Flag, Metric
from resmaster_stages.metrics.resize import resize

MAX_PSNR = 100.0
"""The dB that are reported for equal images. Their PSNR is infinite, but tables hold finite numbers."""


def agreement(high_res: Image.Image | Array, low_res: Image.Image | Array) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of `high_res`, averaged down to the size of `low_res`, against `low_res`."""
    reference = rgb(low_res)
    down = resize(high_res, reference.shape[0], reference.shape[1], "box")
    return psnr(down, reference), ssim(down, reference)


def psnr(a: Image.Image | Array, b: Image.Image | Array) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mean((a - b)^2)) over all RGB values; at most 100."""
    x, y = rgb(a).astype(np.float64), rgb(b).astype(np.float64)
    if x.shape != y.shape:
        raise ValueError(f"images of one size expected, got {x.shape} and {y.shape}")
    error = float(np.mean((x - y) ** 2))
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * float(np.log10(255.0**2 / error)))


def ssim(a: Image.Image | Array, b: Image.Image | Array) -> float:
    """Mean structural similarity of the luma (Wang, Bovik, Sheikh, Simoncelli 2004).

    Gaussian window of sigma 1.5 cut off at 11 x 11 px, K1 = 0.01, K2 = 0.03, L = 255, population covariances. The 5 px
    next to the border, whose windows are incomplete, are left out if the image has more than 10 px along both axes.
    """
    from scipy.ndimage import gaussian_filter

    x, y = luminance(a).astype(np.float64), luminance(b).astype(np.float64)
    if x.shape != y.shape:
        raise ValueError(f"images of one size expected, got {x.shape} and {y.shape}")

    def blur(values: Array) -> Array:
        return gaussian_filter(values, 1.5, mode="reflect", radius=5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    if min(values.shape) > 10:
        values = values[5:-5, 5:-5]
    return float(values.mean())


METRIC = Metric(
    compute=lambda pair: agreement(pair.high_rgb, pair.low_rgb),
    columns=(
        Column(
            "agreement_psnr",
            "PSNR of the down-scaled result against the low-res image: is structure kept?",
            label="PSNR",
            form="{:.1f} dB",
            better="↑",
            compared=True,
            flag=Flag(
                "structure", "the down-scaled result disagrees with the low-res image", below="min_agreement_psnr"
            ),
            badness=(40.0, 0.0),
        ),
        Column(
            "agreement_ssim",
            "structural similarity of the down-scaled result with the low-res image",
            label="SSIM",
            form="{:.3f}",
            better="↑",
            compared=True,
        ),
    ),
)
