"""Writes PNG files of 16 bits per channel, which Pillow cannot write in colour.

Every line is stored as its difference from the line above (filter `Up`), which suits images without noise.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVELS = 2**16 - 1
_BITS, _UP = 16, 2
_COLOUR_TYPES = {3: 2, 4: 6}
"""Channels -> the colour type: RGB, and RGB with alpha."""


def encode_deep_png(pixels: NDArray[np.uint16], pnginfo: Any = None) -> bytes:
    """`pixels` [H, W, 3 or 4] as a PNG. pnginfo: what the file says of itself, as Pillow's encoder takes it."""
    height, width, channels = pixels.shape
    lines = pixels.astype(">u2").view(np.uint8).reshape(height, -1)  # [H, bytes of a line]
    rows = np.empty((height, 1 + lines.shape[1]), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=rows[1:, 1:])
    file = io.BytesIO(SIGNATURE)
    file.seek(len(SIGNATURE))
    header = struct.pack(">IIBBBBB", width, height, _BITS, _COLOUR_TYPES[channels], 0, 0, 0)
    PngImagePlugin.putchunk(file, b"IHDR", header)
    for chunk in pnginfo.chunks if pnginfo is not None else ():
        PngImagePlugin.putchunk(file, *chunk[:2])
    PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(rows.tobytes(), 6))
    PngImagePlugin.putchunk(file, b"IEND")
    return file.getvalue()


def deep_levels(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Values from 0 to 1 as the nearest of 65,536 levels. Values beyond are clipped."""
    return np.rint(np.clip(values, 0.0, 1.0) * LEVELS).astype(np.uint16)
