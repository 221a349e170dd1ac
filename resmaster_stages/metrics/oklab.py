"""Oklab, a colour space in which distances are about as great as they look (Björn Ottosson, 2020).

Source: https://bottosson.github.io/posts/oklab/ (matrices of 2021-01-25).
"""

from __future__ import annotations

import numpy as np

from resmaster_stages.metrics.luminance import Array

TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
"""From linear sRGB to the responses of long, medium and short cones."""

TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
"""From the cube roots of the cones' responses to lightness, green to red, and blue to yellow."""


def oklab(values: Array) -> Array:
    """sRGB [..., 3] (gamma-encoded, clipped to 0 to 255) as Oklab times 100, float64 [..., 3].

    Black is (0, 0, 0) and white is (100, 0, 0). A difference of about 2 can just be seen.
    """
    encoded = np.clip(np.asarray(values, dtype=np.float64) / 255, 0, 1)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return 100 * np.cbrt(linear @ TO_CONES.T) @ TO_LAB.T
