"""Seams: are there steps in the image exactly where views or tiles end?

A view's border lies between two pixel rows or columns. The step across each border line is compared with the steps
across the lines next to it. A horizon or a wall that crosses the line counts for both and cancels out. Borders lie on
the latent grid, but this module works in pixels.

If a view ends beyond the image, the image continues at the opposite border (it wraps). Then that border is an inner
line too: the image is rolled until no view ends at its border.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, luminance, rgb
from resmaster_stages.metrics.metric import Column, Flag, Metric

REACH_PX = 6
"""Number of lines on each side with which a border is compared."""
LATENT_PX = 8
"""Decoders leave a faint grid of this pitch, and all view borders lie on it. So a border is also compared with the
lines 1 and 2 cells away."""
FLOOR = 0.5
"""Grey levels added to both sides of the ratio, because steps below the rounding of 8 bits are not seams."""
SEGMENTS = 8
"""Number of segments of a border line that are judged separately."""


def seam_ratio(image: Image.Image | Array, boxes: Sequence[tuple[int, int, int, int]]) -> float:
    """Steps on view borders over steps beside them: about 0.7 to 1.1 without seams, and 1 without inner borders.

    `boxes` are the views' (y0, x0, y1, x1), half-open, in px of `image`. For each border line, the luma's absolute
    differences across the line are averaged along each of 8 segments. They are divided by the median of the same at
    distances of 1 to 6 px, or of 8 and 16 px if that is greater. The ratio of a line is the median over its segments,
    because a seam runs along the whole line while a contour crosses or touches it in places. The result is the mean
    over all lines, because seams recur. Of three or more lines along an axis, the greatest ratio is left out, because a
    horizon may happen to lie on the line.
    """
    y = luminance(image)
    ratios: list[float] = []
    for axis, size in ((0, y.shape[0]), (1, y.shape[1])):
        lines, roll = border_lines(boxes, axis, size)
        y = np.roll(y, roll, axis) if roll else y
        inner = sorted(line for line in lines if 0 < line < size)
        if not inner:
            continue
        steps = np.abs(np.diff(y, axis=axis))  # [size-1, .]: row i is the step between px i and i+1
        if axis == 1:
            steps = steps.T
        parts = np.array_split(steps, min(SEGMENTS, steps.shape[1]), axis=1)
        profile = np.stack([part.mean(axis=1) for part in parts], axis=1)  # [size-1, segments]
        along: list[float] = []
        for line in inner:
            at = line - 1
            near = [i for i in range(at - REACH_PX, at + REACH_PX + 1) if i != at and 0 <= i < len(profile)]
            beside = np.median(profile[near], axis=0)
            cells = [i for i in (at + step * LATENT_PX for step in (-2, -1, 1, 2)) if 0 <= i < len(profile)]
            cells = [i for i in cells if i + 1 not in lines]
            if cells:
                beside = np.maximum(beside, np.median(profile[cells], axis=0))
            along.append(float(np.median((profile[at] + FLOOR) / (beside + FLOOR))))
        ratios += sorted(along)[:-1] if len(along) > 2 else along
    return float(np.mean(ratios)) if ratios else 1.0


def border_lines(
    boxes: Sequence[tuple[int, int, int, int]], axis: int, size: int, unit: float = 1
) -> tuple[set[int], int]:
    """(the lines along `axis` where views begin or end, how far an image of `size` px is rolled so that no such line
    is its border). The roll is 0 unless the image wraps. It is a multiple of `unit`, rounded to whole px."""
    lines = {box[axis] for box in boxes} | {box[axis + 2] for box in boxes}
    if max(lines, default=0) <= size:
        return lines, 0
    lines = {line % size for line in lines}
    first, second, *_ = (*sorted(lines), size)
    roll = -round(round((first + second) / 2 / unit) * unit)
    return {(line + roll) % size for line in lines}, roll


def seam_worst(
    high_res: Image.Image | Array, low_res: Image.Image | Array, boxes: Sequence[tuple[int, int, int, int]]
) -> float:
    """Grey levels of the step along the worst stretch of a view border. 0 if there is no step.

    A stretch is the part of a border line between two border lines across it, so a view that does not fit in has four
    or more stretches. A stretch is cut into pieces as long as a low-res px. The step of a piece is the greatest of the
    channels' mean differences across the line. The greatest such step at the lines 2 to 16 px beside it is subtracted
    (texture, grain, a decoder's grid). The range of the four px around it in the low-res image is subtracted too,
    because a contour in both images is not a seam. The median of the pieces counts, because a seam runs along the whole
    stretch while a contour crosses it or bends away.
    """
    values, origin = rgb(high_res), rgb(low_res)
    lines = []
    for axis, size in enumerate(values.shape[:2]):
        unit = size / origin.shape[axis]
        found, roll = border_lines(boxes, axis, size, unit)
        if roll:
            values, origin = np.roll(values, roll, axis), np.roll(origin, round(roll / unit), axis)
        lines.append(sorted(found | {0, size}))
    worst = 0.0
    for axis in (0, 1):
        turned, source = (values, origin) if axis == 0 else (values.swapaxes(0, 1), origin.swapaxes(0, 1))
        for line in lines[axis][1:-1]:
            excess = _excess(turned, source, line, set(lines[axis]))
            pieces = len(excess)
            for start, end in itertools.pairwise(lines[1 - axis]):
                first, last = (round(edge * pieces / turned.shape[1]) for edge in (start, end))
                if last > first:
                    worst = max(worst, float(np.median(excess[first:last])))
    return worst


def _excess(values: Array, origin: Array, line: int, borders: set[int]) -> Array:
    """For each piece of the line before row `line`: its step minus the steps beside it and the range in the low-res
    image."""
    height, width = values.shape[:2]
    pieces = min(origin.shape[1], width)
    cut = np.arange(pieces) * width // pieces  # where each begins

    def step(at: int) -> Array:
        across = np.add.reduceat(values[at] - values[at - 1], cut, axis=0)  # [pieces, 3]
        return np.abs(across).max(axis=1) / np.diff([*cut, width])

    distances = [sign * distance for distance in range(2, 2 * LATENT_PX + 1) for sign in (-1, 1)]
    beside = [step(line + d) for d in distances if 0 < line + d < height and line + d not in borders]
    usual = np.max(beside, axis=0) if beside else np.zeros(pieces)
    row, column = line * origin.shape[0] // height, np.minimum(cut * origin.shape[1] // width, origin.shape[1] - 1)
    around = origin[max(0, row - 2) : row + 2][:, column]  # [4, pieces, 3]
    known = np.ptp(around, axis=0).max(axis=1)
    return np.maximum(step(line) - usual - known, 0)


METRIC = Metric(
    compute=lambda pair: (
        seam_ratio(pair.high_rgb, pair.boxes),
        seam_worst(pair.high_rgb, pair.low_rgb, pair.boxes),
    ),
    columns=(
        Column(
            "seam",
            "steps on view borders over steps beside them; about 1 is none",
            label="seam",
            better="↓",
            compared=True,
            flag=Flag("seam", "steps in the image where views end", above="max_seam"),
            badness=(1.0, 2.0),
        ),
        Column(
            "seam_worst",
            "grey levels of the step along the worst stretch of a view border",
            label="worst border",
            form="{:.1f}",
            better="↓",
            compared=True,
            flag=Flag("border", "a hard step along the border of one view", above="max_seam_worst"),
            badness=(0.0, 20.0),
        ),
    ),
)
