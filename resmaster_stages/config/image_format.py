"""The file formats that a dataset's images may have."""

from __future__ import annotations

from typing import Literal

ImageFormat = Literal["webp", "png", "avif", "jxl"]
"""Formats by the extension of their files. `jxl` is JPEG XL."""


def lossless_format(image_format: ImageFormat) -> ImageFormat:
    """The format for images of the same dataset that may lose nothing: WebP instead of AVIF, whose encoder rounds
    colours even at its highest quality."""
    return "webp" if image_format == "avif" else image_format
