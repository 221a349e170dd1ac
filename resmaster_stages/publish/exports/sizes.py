"""Makes smaller copies of images, for trainers that want a size.

A copy has at most as many px as a square of the size, as trainers count, and the image's aspect. It is made by the rule
of the metrics (`metrics/resize.py`): Lanczos on sRGB values, not on linear light, because the images that models were
trained with are made so. Nothing is enlarged.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from resmaster_stages.dataset.sample import EncodedImage
from resmaster_stages.metrics.resize import resize
from resmaster_stages.storage.images import encode_image


def fitted(height: int, width: int, size: int | None) -> tuple[int, int]:
    """(height, width) of an image's copy with at most `size`**2 px. Its own, if it has no more, and for None."""
    if size is None or height * width <= size**2:
        return height, width
    return max(1, math.isqrt(size**2 * height // width)), max(1, math.isqrt(size**2 * width // height))


def copied(image: EncodedImage, height: int, width: int) -> bytes:
    """The image at `height` x `width` px, as PNG. Raises SampleError if it cannot be decoded."""
    values = resize(image.open(), height, width, "lanczos")
    return encode_image(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)), "png")
