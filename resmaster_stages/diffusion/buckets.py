"""The 40 image sizes that SDXL was trained on (Podell et al. 2023, appendix I).

All have about the native area, with aspect ratios from 1:4 to 4:1. Sizes are (height, width) in px.
"""

from __future__ import annotations

from math import ceil

_AT_1024 = (  # the widest first
    *((512, width) for width in (2048, 1984, 1920, 1856)),
    *((576, width) for width in (1792, 1728, 1664)),
    *((640, width) for width in (1600, 1536)),
    *((704, width) for width in (1472, 1408, 1344)),
    *((768, width) for width in (1344, 1280)),
    *((832, width) for width in (1216, 1152)),
    *((896, width) for width in (1152, 1088)),
    *((960, width) for width in (1088, 1024)),
    *((1024, width) for width in (1024, 960)),
    *((1088, width) for width in (960, 896)),
    *((1152, width) for width in (896, 832)),
    (1216, 832),
    *((height, 768) for height in (1280, 1344)),
    *((height, 704) for height in (1408, 1472)),
    *((height, 640) for height in (1536, 1600)),
    *((height, 576) for height in (1664, 1728, 1792)),
    *((height, 512) for height in (1856, 1920, 1984, 2048)),
)


def buckets(native_px: int) -> tuple[tuple[int, int], ...]:
    """The 40 sizes, scaled to a model whose square training images have an edge of `native_px`, the widest first."""
    return tuple((round(h * native_px / 1024), round(w * native_px / 1024)) for h, w in _AT_1024)


def base_size(height: int, width: int, native_px: int) -> tuple[tuple[int, int], int]:
    """The bucket whose whole multiple covers `height` x `width` px best, and that multiple.

    FouriScale's rule: of the buckets that need the same multiple for both sides, the one that pads the two sides by the
    least sum of px; of equal ones the widest. Our rule for canvases that have no such bucket: the larger of the two
    multiples counts for both sides, and the bucket with the least covered area wins.
    """

    def multiple(size: tuple[int, int]) -> int:
        return max(ceil(height / size[0]), ceil(width / size[1]))

    sizes = buckets(native_px)
    if even := [size for size in sizes if ceil(height / size[0]) == ceil(width / size[1])]:
        best = min(even, key=lambda size: multiple(size) * sum(size))
    else:
        best = min(sizes, key=lambda size: multiple(size) ** 2 * size[0] * size[1])
    return best, multiple(best)
