"""Pictures as files: the one place where the pipeline's own pictures are encoded. Imports no torch.

Knows nothing about samples or shards; decoding is `storage.images`' business.

Invariant: equal pixels and settings give equal bytes (with one version of Pillow).
"""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image

from resmaster_stages.errors import SampleError


def encode_picture(image: Image.Image, image_format: Literal["webp", "png"], quality: int = 100) -> bytes:
    """`image` as a file's bytes. PNG and WebP of quality 100 are lossless. Raises SampleError where the format cannot."""
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=6)
    elif max(image.size) > 16383:
        raise SampleError(
            f"WebP holds at most 16383 px a side, this is {image.width}x{image.height}; set image_format: png"
        )
    else:
        image.save(buffer, "WEBP", lossless=quality == 100, quality=quality, method=4, exact=False)
    return buffer.getvalue()
