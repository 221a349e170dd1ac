"""Resizes images for all metrics by clean-fid's rule (Parmar, Zhang, Zhu, CVPR 2022).

The rule is PIL's antialiased resampling, on each channel in float32, without rounding to bytes in between. The default
resizing of other libraries aliases or rounds. Metrics then differ by more than the methods that they compare.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from resmaster_stages.metrics.luminance import Array, rgb

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


def resize(image: Image.Image | Array, height: int, width: int, filter: str = "bicubic") -> Array:
    """`image` at `height` x `width` px: float32 [height, width, 3].

    Bicubic values may lie slightly outside 0 to 255. `box` averages areas.
    """
    values = rgb(image)
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(values[:, :, c])).resize((width, height), FILTERS[filter]))
        for c in range(values.shape[2])
    ]
    return np.stack(channels, axis=2)
