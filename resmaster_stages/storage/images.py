"""Decodes and encodes images.

Content from outside is untrusted: only the decoders of `FORMATS` are called, whatever the name of a file.

A decoded image is RGB in sRGB, 8 bits, upright, and white where it was transparent. Nothing else of the
file is kept.
- Of animations, and of files with several pages, the first counts.
- 16-bit pixels keep their upper 8 bits.
- Colours are converted by the embedded profile. A profile that is damaged, or made for another kind of pixels, is
  ignored, as browsers do. Other statements of a colour space (PNG's gAMA and cHRM, AVIF's nclx) are not read.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import (
    GifImagePlugin,
    Image,
    ImageChops,
    ImageCms,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    features,
)

from resmaster_stages.config.image_format import ImageFormat
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.storage.labels import Label, label_options

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
with suppress(ImportError):  # the plugin of Pillow for JPEG XL (extra `jxl`), if it is installed
    import pillow_jxl  # noqa: F401
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
_NAMES = {"WEBP": "WebP", "JXL": "JPEG XL"}
JXL_EXTRA = "pip install 'resmaster-pipeline[jxl]'"
"""How JPEG XL is installed."""
FORMATS_READ = ", ".join(_NAMES.get(name, name) for name in FORMATS)
"""The formats that are decoded here, as users read them."""

_ORIENTATION = 274  # tag of EXIF and TIFF; the others are of TIFF alone
_NEW_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 254, 258, 259, 262, 322, 323
_SAMPLE_FORMAT, _DNG_VERSION = 339, 50706
_SIGNED = 2
_NUMBERS = (
    "its pixels are signed, 32-bit or floating-point numbers, which do not say what is black and white; scale them to "
    "8 or 16 bits"
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""
_SWAPPING = (5, 6, 7, 8)
"""The orientations that swap the sides."""
_GREY = ("1", "L", "LA", "La")
_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of a profile -> the mode of the pixels that it describes."""
_PROBES = {
    "L": Image.frombytes("L", (256, 1), bytes(range(256))),
    "RGB": Image.frombytes("RGB", (216, 1), bytes(itertools.chain(*itertools.product(range(0, 256, 51), repeat=3)))),
}
"""Mode -> colours that tell whether a profile is sRGB."""
_SAME_LEVELS = 2
"""A profile that changes no colour of a probe by more levels is taken as sRGB, and the pixels stay as they are."""
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";", "WEBP": b"", "PNG": b""}
"""Format -> the end of a whole file. A WebP that was cut off cannot be opened. A PNG is decoded for its orientation."""
LONGEST_PX = {"WEBP": 16383, "JPEG": 65500, "AVIF": 32768}
"""The longest side, in px, of a format that has a limit: what its files can hold, or what the decoder takes (AVIF)."""

# What Pillow warns of (odd metadata, many pixels) is either harmless or an error here. The filter is set once, because
# threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
# Programs write more than Pillow's limit of 1 MiB (workflows, profiles of scanners) beside the pixels of a PNG.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# Without libtiff, Pillow takes the high and low bytes of uncompressed 16-bit planes for pixels.
TiffImagePlugin.READ_LIBTIFF = True
# libtiff itself writes of damaged files to stderr, and Pillow has no switch for that. A damaged file is an error here.
_LIBTIFF: Any = None
with suppress(OSError, AttributeError):
    _core = ctypes.CDLL(Image.core.__file__)
    _core.TIFFSetErrorHandler(None)
    _LIBTIFF = _core


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file fully, as upright RGB in sRGB. Transparency becomes white. Raises SampleError."""
    with _explained(name):
        return _converted(_opened(data))


def convert_image(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode as `decode_image` would give it. Raises SampleError."""
    with _explained(name):
        _check_pixels(image)
        return _converted(image)


def decode_alpha(data: bytes, name: str) -> Image.Image | None:
    """How opaque an image file is, as upright L of the size that `decode_image` gives. None if it is opaque throughout.
    Raises SampleError."""
    with _explained(name):
        image = _opened(data)
        _, alpha = _with_alpha(_loaded(image))
        turn = _TURNS.get(_orientation(image))
        if alpha is None or alpha.getextrema() == (255, 255):
            return None
        return alpha if turn is None else alpha.transpose(turn)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) in px that `decode_image` would give. Raises SampleError for a file that was cut off, too.

    Only the header is read of a JPEG, WebP or GIF with a regular end. Other files are decoded.
    """
    with _explained(name):
        image = _opened(data)
        end = _ENDS.get(str(image.format))
        if end is None or not data.endswith(end):
            _loaded(image)
        known = getattr(image, "tag_v2", {}).get(_ORIENTATION) in _SWAPPING  # of a TIFF, Pillow gives the upright size
        swapped = not known and _orientation(image) in _SWAPPING
        return (image.width, image.height) if swapped else (image.height, image.width)


@contextmanager
def open_header(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image file as Pillow opens it, for what it says beside its pixels. Errors of the block, too, become
    SampleErrors, because metadata is as untrusted as pixels are."""
    with _explained(name):
        yield _opened(data)


class _Unfit(Exception):
    """Why an image that could be decoded is not used, and what to do."""


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise any error as a SampleError. Decoders raise many classes (struct.error, KeyError, ...)."""
    try:
        yield
    except _Unfit as error:
        raise SampleError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        reason = f"the image has too many pixels (more than {limit}); scale it down, or leave it out"
        raise SampleError(f"{name}: {reason}") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text holds the address of an object
            reason = f"it is none of {FORMATS_READ}, or damaged, or has an unusual kind of pixels"
        elif reason.startswith("decoder error"):  # of libtiff, whose own message goes to stderr
            reason = "it is damaged or cut off"
        raise SampleError(
            f"{name}: not a readable image ({reason}); convert it to PNG or JPEG, or leave it out"
        ) from error


def _opened(data: bytes) -> Image.Image:
    """Open an image file and read its header. Raises DecompressionBombError for too many pixels, and _Unfit."""
    if "JXL" in FORMATS:
        _check_jxl(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_pixels(image)
    tags = getattr(image, "tag_v2", {})
    if Image.MAX_IMAGE_PIXELS and tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError  # a tile is decoded whole, however small the image is
    if _DNG_VERSION in tags or tags.get(_NEW_SUBFILE_TYPE, 0) & 1:
        raise _Unfit("a camera's raw file, or a TIFF that begins with a thumbnail; export the image as PNG or JPEG")
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise _Unfit(_NUMBERS)
    compression = tags.get(_COMPRESSION, 1)
    if tags and _LIBTIFF is not None and not _LIBTIFF.TIFFIsCODECConfigured(compression):
        raise _Unfit(f"a TIFF whose compression ({compression}) is not read; save it with LZW or without compression")
    transparent = image.info.get("transparency")
    if image.format == "PNG" and image.mode in ("L", "RGB") and transparent is not None:
        image.info["transparency"] = _of_eight_bits(transparent, image.tile[0].args)
    return image


def _of_eight_bits(transparent: Any, raw: Any) -> Any:
    """The transparent level or colour of a PNG (tRNS), which Pillow gives as it is stored, in 8 bits per channel."""
    if raw in ("L;2", "L;4"):
        return transparent * (85 if raw == "L;2" else 17)
    return tuple(level >> 8 for level in transparent) if raw == "RGB;16B" else transparent


def _check_pixels(image: Image.Image) -> None:
    """Raise DecompressionBombError for too many pixels, and _Unfit for pixels whose black and white are unknown.

    Up to twice the limit, Pillow itself only warns.
    """
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if image.mode in ("I", "F"):
        raise _Unfit(_NUMBERS)


_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_JXL_HEADER_BYTES = 16
"""Enough of a codestream to tell the size: at most 68 bits after the mark."""
_JXL_RATIOS = (None, (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, by the number that stands for it in a JPEG XL."""


def _check_jxl(data: bytes) -> None:
    """Raise DecompressionBombError if a JPEG XL says that it has too many pixels. Its decoder decodes when it opens."""
    if not data.startswith((_JXL_CODESTREAM, _JXL_CONTAINER)):
        return
    height, width = _jxl_size(_jxl_codestream(data))
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _jxl_codestream(data: bytes) -> bytes:
    """The beginning of the codestream of a JPEG XL, which a container may hold in several boxes."""
    if data.startswith(_JXL_CODESTREAM):
        return data[:_JXL_HEADER_BYTES]
    found, place = b"", len(_JXL_CONTAINER)
    while place + 8 <= len(data) and len(found) < _JXL_HEADER_BYTES:
        size, kind, head = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        end = len(data) if size < head else place + size  # 0: the box goes to the end of the file
        if kind in (b"jxlc", b"jxlp"):
            first = place + head + (4 if kind == b"jxlp" else 0)
            found += data[first : min(end, first + _JXL_HEADER_BYTES)]
        place = end
    return found[:_JXL_HEADER_BYTES]


def _jxl_size(codestream: bytes) -> tuple[int, int]:
    """(height, width) in px from the beginning of a codestream. Bits are read from the lowest on."""
    bits = int.from_bytes(codestream[len(_JXL_CODESTREAM) :], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), _JXL_RATIOS[take(3)]
    return height, side() if ratio is None else height * ratio[0] // ratio[1]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if its EXIF cannot be read, or if Pillow has turned it (TIFF)."""
    if image.format == "PNG":
        image.load()  # its EXIF may follow the pixels
    with suppress(Exception):
        found = image.getexif().get(_ORIENTATION)
        return int(found) if found in _TURNS else 1
    return 1


def _converted(image: Image.Image) -> Image.Image:
    """A new image: 8 bits, upright, RGB, sRGB, on white, and without any metadata."""
    loaded = _loaded(image)
    profile, turn = image.info.get("icc_profile"), _TURNS.get(_orientation(image))
    image, alpha = _with_alpha(loaded)
    result = _in_srgb(image, profile)
    if alpha is not None:
        result.putalpha(alpha)
        result = Image.alpha_composite(Image.new("RGBA", result.size, "white"), result).convert("RGB")
    result.info = {}
    return result if turn is None else result.transpose(turn)


def _with_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A loaded image as L, RGB, CMYK or LAB of 8 bits, and how opaque it is: L, or None if its file does not say."""
    if image.mode.startswith("I;16"):
        image = _of_16_bits(image)
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in _GREY else "RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("CMYK", "LAB"):
        image = image.convert("L" if image.mode in _GREY else "RGB")
    return image, alpha


def _loaded(image: Image.Image) -> Image.Image:
    """An image with its pixels, in which is transparent what browsers show so."""
    frame = image.tile[0].extents if isinstance(image, GifImagePlugin.GifImageFile) and image.tile else None
    image.load()
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")  # many programs leave the fourth byte at 0, whatever the header calls the byte
    if frame in (None, (0, 0, *image.size)):
        return image
    whole = Image.new("RGBA", image.size)  # the first frame covers a part only
    whole.paste(image.convert("RGBA").crop(frame), frame)
    return whole


def _of_16_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as L, or as LA if one level is transparent. Pillow would clip it to white."""
    tags = getattr(image, "tag_v2", {})
    order = "I;16" if sys.byteorder == "little" else "I;16B"
    # Pillow 12 clips I;16N, too.
    known = Image.frombytes(order, image.size, image.tobytes()) if image.mode == "I;16N" else image
    levels = np.asarray(known.convert("I"))
    grey = (levels >> tags.get(_BITS, (16,))[0] - 8).astype(np.uint8)  # TIFFs may have 12 bits
    result = Image.fromarray(~grey if tags.get(_PHOTOMETRIC) == 0 else grey)  # 0: the lowest level is white
    if "transparency" in image.info:
        result.putalpha(Image.fromarray((levels != image.info["transparency"]).astype(np.uint8) * 255))
    return result


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB, CMYK or LAB as RGB in sRGB. May change `image`."""
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _to_srgb(lab, "LAB").apply(image)
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = _SPACES.get(source.profile.xcolor_space.strip())
            if mode == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            elif mode == "L" and image.mode == "RGB" and _is_grey(image):  # Pillow gives some grey with alpha so
                image = image.convert("L")
            if mode == image.mode:
                return _by_profile(image, _to_srgb(source, mode))
        except (OSError, ValueError, ImageCms.PyCMSError):
            pass  # a damaged profile is ignored, as one for another kind of pixels is
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """Relative colorimetric keeps the colours that sRGB has exactly. Compensation of the black point keeps the shadows
    of printing inks. LittleCMS's fast way for grey is wrong in the shadows."""
    exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | exact
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


def _by_profile(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    if image.mode == "CMYK":
        return transform.apply(image)
    probe = _PROBES[image.mode]
    probed = transform.apply(probe)
    if np.asarray(ImageChops.difference(probed, probe.convert("RGB"))).max() <= _SAME_LEVELS:
        return image.convert("RGB")
    if image.mode == "L":  # by a table, which is fast
        return image.point(probed.getchannel("R").tobytes()).convert("RGB")
    return transform.apply(image, image)


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue


def why_unstorable(height: int, width: int, image_format: ImageFormat) -> str:
    """Why an image of `height` x `width` px cannot be stored, or not be read again; "" if it can."""
    name = image_format.upper()
    limit = LONGEST_PX.get(name)
    if limit is not None and max(height, width) > limit:
        shown = _NAMES.get(name, name)
        return f"{shown} holds at most {limit} px a side, this is {width}x{height}; set image_format: png"
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        return f"{width}x{height} px are too many pixels (more than {most}); enlarge it less, or begin with less"
    return ""


def require_writable(image_format: ImageFormat) -> None:
    """Raise ConfigError if this installation cannot write and read the format."""
    name = image_format.upper()
    if name not in FORMATS:
        remedy = JXL_EXTRA if name == "JXL" else "pip install --upgrade pillow"
        raise ConfigError(f"{_NAMES.get(name, name)} is not installed; {remedy}, or choose another format")


def encode_image(
    image: Image.Image, image_format: ImageFormat, quality: int = 100, label: Label | None = None
) -> bytes:
    """Encode `image`, with what it says of itself. PNG, and WebP and JPEG XL of quality 100, are lossless. AVIF never
    is. Raises SampleError if the image is too large.

    The same pixels and label give the same bytes on any number of cores.
    """
    if problem := why_unstorable(image.height, image.width, image_format):
        raise SampleError(problem)
    buffer = io.BytesIO()
    said = {} if label is None else label_options(label, image_format)
    image.save(buffer, image_format.upper(), **encoder_options(image_format, quality), **said)
    return buffer.getvalue()


def encoder_options(image_format: ImageFormat, quality: int) -> dict[str, Any]:
    """How an image of a format is encoded, as Pillow takes it."""
    if image_format == "png":
        return {"compress_level": 6}
    if image_format == "webp":
        return {"lossless": quality == 100, "quality": quality, "method": 4, "exact": False}
    if image_format == "jxl":
        return {"lossless": quality == 100, "quality": quality, "effort": 7 if quality == 100 else 5}
    # 4:4:4: training sets need the colours of fine detail. Threads and tiles change the bytes, so both are fixed.
    return {
        "quality": quality,
        "subsampling": "4:4:4",
        "speed": 8,
        "codec": "aom",
        "max_threads": 4,
        "autotiling": False,
    }
