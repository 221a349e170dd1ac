"""Luma of an RGB image, the one channel that most metrics use.

Invariant: results are float32 (images are large) from 0 to 255, with the height and width of the image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of gamma-encoded red, green and blue in the Rec. 601 luma, as in PIL's mode `L`."""

Array = NDArray[np.floating]


def rgb(image: Image.Image | Array) -> Array:
    """An image as float32 [H, W, 3] from 0 to 255. Arrays must have this shape. Grey and alpha images are converted."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=np.float32)
    values = np.asarray(image, dtype=np.float32)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"expected an array of shape [H, W, 3], got {values.shape}")
    return values


def luminance(image: Image.Image | Array) -> Array:
    """Luma Y = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), float32 [H, W], range 0 to 255."""
    return rgb(image) @ WEIGHTS
