"""Seams: are there steps in the picture just where views or tiles end?

A view's border lies between two pixel rows or columns. The step across each border line is compared with the steps across the
lines next to it, line by line, so that a horizon or a wall on the line's way counts for both and cancels out. Knows nothing
about latents, though borders lie on the latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, luminance

REACH_PX = 6
"""Lines on each side of a border that it is compared with."""
LATENT_PX = 8
"""Decoders leave a faint grid of this pitch, on which all view borders lie: lines 1 and 2 cells away are compared too."""
FLOOR = 0.5
"""Grey levels added to both sides of the ratio: steps below the rounding of 8 bits are no seams."""
SEGMENTS = 8
"""Parts of a border line that are judged apart."""


def seam_ratio(image: Image.Image | Array, boxes: Sequence[tuple[int, int, int, int]]) -> float:
    """Steps on view borders over steps beside them; about 0.7 to 1.1 without seams, 1 where there is no inner border.

    `boxes` are the views' (y0, x0, y1, x1), half-open, in px of `image`. Per border line the luma's absolute differences
    across it, averaged along each of 8 segments, are divided by the median of the same at distances 1 to 6 px, or at 8 and
    16 px where that is greater. The median over a line's segments is its ratio, because a seam runs all along while a contour crosses or touches in places. The mean over
    all lines counts, because seams recur; of three lines or more along an axis the greatest is left out, because a horizon
    may happen to lie on it.
    """
    y = luminance(image)
    ratios: list[float] = []
    for axis, size in ((0, y.shape[0]), (1, y.shape[1])):
        lines = {box[axis] for box in boxes} | {box[axis + 2] for box in boxes}
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
