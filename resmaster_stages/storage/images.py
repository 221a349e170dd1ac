"""Decodes and encodes images.

Content from outside is untrusted: only the decoders of `FORMATS` are called, whatever the name of a file.
"""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image, ImageOps, features

from resmaster_stages.errors import SampleError

_SUFFIXES_OF = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JXL": (".jxl",),
}
"""Format of Pillow that may be decoded -> suffixes of its files."""
# Pillow can be built without AVIF, and reads JPEG XL only with a plugin, which whoever installs the plugin imports.
_MISSING = {name for name, there in (("AVIF", features.check("avif")), ("JXL", "JXL" in Image.OPEN)) if not there}
FORMATS = tuple(name for name in _SUFFIXES_OF if name not in _MISSING)
"""Formats that are decoded here. Pillow has dozens of other decoders; one of them (EPS) starts another program."""
SUFFIXES = tuple(suffix for name in FORMATS for suffix in _SUFFIXES_OF[name])
"""Endings of names, in lower case, that say that a file is an image that can be read."""
KNOWN_UNREAD = (
    *(suffix for name, suffixes in _SUFFIXES_OF.items() if name not in FORMATS for suffix in suffixes),
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jpf", ".jxr", ".wdp"),
    *(".psd", ".psb", ".xcf", ".kra", ".ora", ".clip", ".ai", ".eps", ".svg", ".svgz", ".wmf", ".emf"),
    *(".tga", ".ico", ".cur", ".icns", ".pcx", ".dds", ".qoi", ".sgi", ".xbm", ".xpm"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".exr", ".hdr", ".dpx", ".fits", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".x3f", ".3fr", ".iiq", ".mrw", ".rwl"),
)
"""Endings of names, in lower case, of well-known kinds of images that are not read."""
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap the sides


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file fully, as RGB and upright (EXIF). Transparency becomes white. Raises SampleError."""
    try:
        opened = _opened(data)
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    except Exception as error:
        raise _undecodable(name, error) from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) in px that `decode_image` would give, read from the file's header. Raises SampleError."""
    try:
        image = _opened(data)
        swapped = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:
        raise _undecodable(name, error) from error
    return (image.width, image.height) if swapped else (image.height, image.width)


def _opened(data: bytes) -> Image.Image:
    """Open an image file and read its header. Raises DecompressionBombError for too many pixels.

    Up to twice the limit, Pillow itself only warns. Turning its warning into an error would change warning filters,
    which threads share.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    return image


def _undecodable(name: str, error: Exception) -> SampleError:
    """The SampleError for any error of a decoder. Decoders raise many classes (struct.error, KeyError, ...)."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return SampleError(
            f"{name}: the image has too many pixels (more than {Image.MAX_IMAGE_PIXELS:,}); scale it down, or leave "
            "it out"
        )
    return SampleError(f"{name}: not a readable PNG, JPEG or WebP image ({error})")


def encode_image(image: Image.Image, image_format: Literal["webp", "png"], quality: int = 100) -> bytes:
    """Encode `image`. PNG, and WebP of quality 100, are lossless. Raises SampleError if it is too large for WebP."""
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
