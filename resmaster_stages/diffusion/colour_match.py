"""Gives an enlarged image the colours of its low-res image.

- `mean_std`: each channel gets the mean and the standard deviation that it has in the low-res image. This is one curve
  per channel for the whole image.
- `wavelet`: y = x + L(r - x). x is the image, r the low-res image enlarged bicubically, and L the low band of an à
  trous wavelet. So coarse colours are those of the low-res image, place by place, and everything finer stays.

The low band of an à trous wavelet with taps (1, 2, 1) / 4 and n levels is a mean weighted with a tent of half-width
2^n: the product of cos^2(2^i w) over its levels is that of two running means over 2^n px. Five levels are usual where
images are enlarged four times. That is 32 px, or 8 px of the low-res image. The tent is counted in px of the low-res
image, so every scale takes the same share of what the low-res image shows.

Values are those of files (gamma-encoded sRGB). They are nearly even to the eye, and they are what the base model and
the bicubic enlargement work with. In linear light a mean would follow the highlights.

Invariants:
- `none` gives the image itself.
- An image that is the low-res image, enlarged bicubically, stays as it is up to one level of 255.
- `wavelet` needs one float per px beside the images, because channels are matched one by one and filtered in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config.method import ColourMatch
from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.reference import resized, to_tensor

REACH_PX = 8
"""Half-width of the tent, in px of the low-res image."""
BLOCK = 64
"""Lines that are filtered together."""
LEVELS = np.arange(256)


def colour_matched(
    image: Image.Image, low_res: Image.Image, how: ColourMatch, wraps: Axes = (False, False)
) -> Image.Image:
    """`image` (RGB) with the colours of `low_res`, which may have any size.

    wraps: whether the images continue at the opposite border, along their height and along their width.
    """
    if how == "none":
        return image
    like = low_res.convert("RGB")
    return _by_moments(image, like) if how == "mean_std" else _by_low_band(image, like, wraps)


def _by_moments(image: Image.Image, like: Image.Image) -> Image.Image:
    curves = []
    for (mean, deviation), (mean_wanted, deviation_wanted) in zip(_moments(image), _moments(like)):
        gain = deviation_wanted / deviation if deviation else 1.0
        curves += _levels((LEVELS - mean) * gain + mean_wanted).tolist()
    return image.point(curves)


def _moments(image: Image.Image) -> Iterator[tuple[float, float]]:
    """(mean, standard deviation) of each channel."""
    for counts in np.array(image.histogram()).reshape(3, len(LEVELS)):
        mean = float(counts @ LEVELS / counts.sum())
        yield mean, float(np.sqrt(counts @ (LEVELS - mean) ** 2 / counts.sum()))


def _by_low_band(image: Image.Image, like: Image.Image, wraps: Axes) -> Image.Image:
    height, width = image.height, image.width
    reaches = [max(1, round(REACH_PX * large / small)) for large, small in ((height, like.height), (width, like.width))]
    pixels = np.array(image)  # [H, W, 3]
    small = to_tensor(like)
    for channel in range(3):
        reference = resized(small[:, channel : channel + 1], height, width, wraps=wraps)[0, 0]  # [H, W]
        change = reference.clamp_(-1, 1).add_(1).mul_(127.5).numpy()
        change -= pixels[:, :, channel]
        _smooth(change, reaches[0], wraps[0])
        _smooth(change.T, reaches[1], wraps[1])
        change += pixels[:, :, channel]
        pixels[:, :, channel] = _levels(change)
    return Image.fromarray(pixels)


def _smooth(values: NDArray[np.float32], reach: int, wraps: bool) -> None:
    """Replace `values` [n, m] by their means along n, weighted with a tent of half-width `reach`.

    Beyond a border there is the mirror image, border included, or the opposite border.
    """
    for first in range(0, values.shape[1], BLOCK):
        block = values[:, first : first + BLOCK]
        around = ((reach - 1, reach - 1), (0, 0))
        means = np.pad(block.astype(np.float64), around, mode="wrap" if wraps else "symmetric")
        for _ in range(2):  # two running means over `reach` values make a tent
            sums = np.cumsum(means, axis=0)
            sums[reach:] -= sums[:-reach]
            means = sums[reach - 1 :] / reach
        block[...] = means


def _levels(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """`values` rounded to the levels 0 to 255. Changes them."""
    return np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8)
