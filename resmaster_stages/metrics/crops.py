"""Crops for metrics of detail, at the same places of a sample's image for every method and at every size.

FID_c of the papers uses 10 random crops per image. They are cut at the model's native size and then resized, or cut at
the feature network's input size and not resized. Boxes are half-open (y0, x0, y1, x1), in px.

Invariant: the place of a crop, as a fraction of the room for it, depends on the sample's key alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from resmaster_stages.keys import sample_seed

CROPS_PER_IMAGE = 10
"""The number that DemoFusion, AccDiffusion and RectifiedHR use."""

Box = tuple[int, int, int, int]


def crop_boxes(key: str, height: int, width: int, size: int) -> list[Box]:
    """`CROPS_PER_IMAGE` squares of `size` px, at places uniform over an image of `height` x `width` px.

    An image that is smaller than `size` gives squares of its shorter side.
    """
    if min(height, width, size) < 1:
        raise ValueError(f"positive sizes expected, got {height} x {width} px, crops of {size} px")
    edge = min(size, height, width)
    # raw 64-bit words, because numpy guarantees the stream of a bit generator but not that of its distributions
    words = np.random.PCG64(sample_seed(key, 0, "crops")).random_raw(2 * CROPS_PER_IMAGE)
    fractions = (words >> np.uint64(11)).astype(np.float64) / 2.0**53  # in [0, 1)
    boxes = []
    for down, right in fractions.reshape(-1, 2):
        y0, x0 = int(down * (height - edge + 1)), int(right * (width - edge + 1))
        boxes.append((y0, x0, y0 + edge, x0 + edge))
    return boxes


def tile_boxes(height: int, width: int, size: int) -> list[Box]:
    """Squares of `size` px side by side, row by row, over an image of `height` x `width` px.

    If a side is not a multiple of `size`, the rest beyond the last whole square is left out. An image that is smaller
    than a square gives squares of its shorter side.
    """
    if min(height, width, size) < 1:
        raise ValueError(f"positive sizes expected, got {height} x {width} px, squares of {size} px")
    edge = min(size, height, width)
    places = ((y * edge, x * edge) for y in range(height // edge) for x in range(width // edge))
    return [(y, x, y + edge, x + edge) for y, x in places]


def crops(image: Image.Image, boxes: Sequence[Box]) -> list[Image.Image]:
    """The parts of `image` inside `boxes`, not resized."""
    return [image.crop((x0, y0, x1, y1)) for y0, x0, y1, x1 in boxes]
