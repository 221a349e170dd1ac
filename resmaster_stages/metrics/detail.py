"""Detail energy: the share of a high-res image that is finer than its low-res image could hold.

A bicubic enlargement has almost none, the result of a good upscaler has some, and noise has most. Together with the
agreement, detail energy distinguishes "blurred but faithful" (perfect agreement, no detail) from a regenerated image.
It does not say whether the detail is right.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, luminance
from resmaster_stages.metrics.metric import Column, Metric


def detail_energy(high_res: Image.Image | Array, low_height: int, low_width: int) -> float:
    """Share (0 to 1) of the luma's AC energy at frequencies above the Nyquist frequency of a `low_height` x `low_width`
    image.

    Let Y be the 2-D DFT of the luma after a separable Hann window (which keeps the image's borders from ringing), and
    f_y and f_x in cycles per px of the high-res image. The share is sum |Y|^2 where |f_y| > h/(2H) or |f_x| > w/(2W),
    divided by sum |Y|^2 without the mean. It is 0 for an image without any variation, and for an image that is not
    larger than its low-res image.
    """
    from scipy.fft import rfft2

    y = luminance(high_res)
    height, width = y.shape
    window = np.outer(_hann(height), _hann(width))
    centred = (y - (y * window).sum() / window.sum()) * window
    power = np.abs(rfft2(centred)) ** 2  # [H, W/2+1]
    # rfft2 keeps half of the columns, so columns strictly between 0 and Nyquist count twice, for their mirror images
    weight = np.full(power.shape[1], 2.0, dtype=power.dtype)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    power = power * weight
    fy = np.abs(np.fft.fftfreq(height))[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    above = (fy > low_height / (2 * height)) | (fx > low_width / (2 * width))
    total = float(power.sum(dtype=np.float64))
    # By Parseval this is less than a thousandth of a grey level, root mean square: the rounding errors of one colour.
    if total <= 1e-6 * y.size**2:
        return 0.0
    return float(power[above].sum(dtype=np.float64)) / total


def _hann(size: int) -> Array:
    """A Hann window without zeros at its ends."""
    return np.sin(np.pi * (np.arange(size) + 0.5) / size).astype(np.float32) ** 2


ZOOM_SHARE = 0.25
"""Side of the zoomed square, as a fraction of the image's shorter side."""


Box = tuple[int, int, int, int]
"""y0, x0, y1, x1 in px, half-open."""


def most_detailed(image: Image.Image) -> Box:
    """The square with a side of a quarter of the shorter side in which the luma has most fine structure.

    Fine structure is the absolute difference of the luma and its Gaussian blur (sigma a hundredth of the shorter side).
    It is averaged over the square, and capped so that one hard contour does not outweigh texture all over. Of equal
    squares the first one counts, row-major.
    """
    from scipy.ndimage import gaussian_filter, uniform_filter

    y = luminance(image)
    height, width = y.shape
    side = max(1, min(height, width, max(8, round(min(height, width) * ZOOM_SHARE))))
    fine = np.abs(y - gaussian_filter(y, max(1.0, min(height, width) / 100)))
    energy = uniform_filter(np.minimum(fine, 4 * (fine.mean() + 1e-6)), side, mode="constant")
    top, left = side // 2, side // 2
    inside = energy[top : top + height - side + 1, left : left + width - side + 1]
    row, col = np.unravel_index(int(inside.argmax()), inside.shape)
    return int(row), int(col), int(row) + side, int(col) + side


METRIC = Metric(
    compute=lambda pair: (detail_energy(pair.high_rgb, pair.low.height, pair.low.width),),
    columns=(
        Column(
            "detail_energy",
            "share of the image's energy that is finer than the low-res image could hold",
            label="detail",
            form="{:.2%}",
            compared=True,
        ),
    ),
)
