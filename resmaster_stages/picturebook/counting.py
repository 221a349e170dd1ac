"""Counts objects in large images with picturebook's captioner, which is passed in.

The captioner sees 64 px, so an image full of small objects is described tile by tile, with tiles of several sizes. Only
objects that a tile shows whole are counted. For a partly visible object the captioner writes `part of a red house` or
`roof tiles of a red house`. The count of a kind is the greatest count of all tile sizes, because the same object is
whole at several sizes. Objects across tile borders are missed, and a large part of an object is sometimes taken for a
whole. So an image counts as repeating only from a surplus of `LEAST` objects.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from PIL import Image

from resmaster_stages.picturebook.captions import CLOSE_PREFIXES, PAIR

LEAST = 2
"""Least surplus of objects that counts as repeating. A surplus of one is often a false alarm: one object seen in two
tiles."""

_PREFIX = re.compile("|".join(re.escape(prefix) for prefix in CLOSE_PREFIXES) + "|a picture of |a scene with ")


def whole_objects(sentence: str) -> Counter[str]:
    """Kind -> how many whole objects a sentence in picturebook's language names."""
    text = _PREFIX.sub("", sentence.lower().replace(" - ", "-"), count=1)
    found: Counter[str] = Counter()
    for match in PAIR.finditer(text):
        if not re.search(r"\bof an? $", text[: match.start()]):
            found[match[2]] += 1
    return found


def tiles(image: Image.Image, native_px: int) -> list[list[Image.Image]]:
    """Disjoint, about square tiles that cover an image, level by level.

    The edge of a tile is the image's shorter side at the first level, half of it at the next, and so on down to the
    native size. Each tile is shrunk to about the native size by averaging.
    """
    levels = []
    divisions = 1
    while divisions == 1 or min(image.size) >= divisions * native_px:
        counts = [max(1, round(side * divisions / min(image.size))) for side in image.size]
        xs, ys = ([round(side * i / n) for i in range(n + 1)] for side, n in zip(image.size, counts))
        boxes = [(x0, y0, x1, y1) for y0, y1 in itertools.pairwise(ys) for x0, x1 in itertools.pairwise(xs)]
        level = []
        for box in boxes:
            tile = image.crop(box)
            factor = max(1, min(tile.size) // native_px)
            level.append(tile.reduce(factor) if factor > 1 else tile)
        levels.append(level)
        divisions *= 2
    return levels


def count_objects(
    image: Image.Image, describe: Callable[[Sequence[Image.Image]], Sequence[str]], native_px: int
) -> Counter[str]:
    """Kind -> the least number of objects that an image shows. `describe` is the captioner."""
    found: Counter[str] = Counter()
    for level in tiles(image, native_px):
        counts: Counter[str] = Counter()
        for sentence in describe(level):
            counts += whole_objects(sentence)
        found |= counts
    return found
