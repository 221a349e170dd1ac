"""Gives an enlarged image the transparency of its small one.

Images are drawn on white. With the enlarged transparency a, the drawn image is x = a c + (1 - a) white, so the colour
of the transparent image is c = (x - (1 - a)) / a. On white it looks as it was drawn, and elsewhere it has no white rim.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEAST = 0.5 / 255
"""Less opacity than this shows no colour, and its colour is white."""


def with_transparency(pixels: NDArray[np.floating], alpha: Image.Image) -> NDArray[np.float32]:
    """`pixels` [H, W, 3] from 0 to 1, drawn on white, as colours and opacity [H, W, 4] from 0 to 1.

    alpha: the opacity of the small image (L). It is enlarged bicubically, without rounding.
    """
    height, width, _ = pixels.shape
    levels = alpha.convert("F").resize((width, height), Image.Resampling.BICUBIC)
    opacity = np.clip(np.asarray(levels, dtype=np.float32) / 255, 0, 1)[..., None]  # [H, W, 1]
    colours = (pixels - (1 - opacity)) / np.maximum(opacity, LEAST)
    colours = np.where(opacity < LEAST, 1.0, np.clip(colours, 0, 1))
    return np.concatenate([colours, opacity], axis=2, dtype=np.float32)
