"""Says into which aspect bucket sd-scripts puts an image, and what it cuts off.

The rule is that of `bucket_no_upscale`: an image with more pixels than the resolution allows is scaled down, with one
side a multiple of the step. Then each side is cut to a multiple of the step. Nothing is enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from resmaster_stages.publish.exports.format import Row

STEP_PX = 64


@dataclass(frozen=True)
class Bucketed:
    """What becomes of an image. Sizes are (width, height) in px."""

    scaled: tuple[int, int]
    bucket: tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """A bucket with its images."""

    size: tuple[int, int]
    """(width, height) in px."""
    images: int
    cut: tuple[int, int]
    """The most px of the width and of the height that an image loses, after it was scaled."""

    def spelled(self) -> str:
        """The bucket in one line, for people."""
        (width, height), (columns, rows) = self.size, self.cut
        line = f"bucket {width}x{height}: {self.images:,} images"
        if not width or not height:
            return f"{line}, too small: a side has fewer than {STEP_PX} px; leave them out"
        if not columns and not rows:
            return f"{line}, nothing is cut off"
        return f"{line}, up to {columns} px of the width and {rows} px of the height are cut off"


def bucketed(width: int, height: int, resolution: int) -> Bucketed:
    """What becomes of an image in px, at a resolution of `resolution` x `resolution` px."""
    scaled = (width, height)
    if width * height > resolution**2:
        aspect = width / height
        by_width = _rounded(math.sqrt(resolution**2 * aspect))
        by_height = _rounded(math.sqrt(resolution**2 / aspect))
        if _error(by_width, by_width / aspect, aspect) < _error(by_height * aspect, by_height, aspect):
            scaled = (by_width, int(by_width / aspect + 0.5))
        else:
            scaled = (int(by_height * aspect + 0.5), by_height)
    return Bucketed(scaled, (scaled[0] - scaled[0] % STEP_PX, scaled[1] - scaled[1] % STEP_PX))


def _rounded(side: float) -> int:
    """A side in whole px, cut to a multiple of the step."""
    whole = int(side + 0.5)
    return whole - whole % STEP_PX


def _error(width: float, height: float, aspect: float) -> float:
    """How far the aspect is from the image's after both sides are multiples of the step."""
    sides = _rounded(width), _rounded(height)
    return abs(sides[0] / sides[1] - aspect) if all(sides) else math.inf


def buckets(rows: Iterable[Row], resolution: int) -> list[Bucket]:
    """The buckets of images, by size. rows: with `width` and `height` in px."""
    found: dict[tuple[int, int], Bucket] = {}
    for row in rows:
        image = bucketed(row["width"], row["height"], resolution)
        cut = (image.scaled[0] - image.bucket[0], image.scaled[1] - image.bucket[1])
        known = found.get(image.bucket, Bucket(image.bucket, 0, (0, 0)))
        most = (max(known.cut[0], cut[0]), max(known.cut[1], cut[1]))
        found[image.bucket] = Bucket(image.bucket, known.images + 1, most)
    return [found[size] for size in sorted(found)]


def resolution_of(size: int | None, rows: Iterable[Row]) -> int:
    """The resolution at which no image is scaled down, a multiple of the step. size: of the part, or None."""
    areas = (row["width"] * row["height"] for row in rows)
    side = math.isqrt(max(max(areas, default=0) - 1, 0)) + 1
    return -(-max(side, size or 1) // STEP_PX) * STEP_PX
