"""Every kind of image that is read gives its true colours; everything else is one SampleError, and silence."""

import itertools
import logging
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from resmaster_stages.errors import SampleError
from resmaster_stages.storage import images
from resmaster_stages.storage.images import FORMATS, KNOWN_UNREAD, SUFFIXES, convert_image, decode_image, image_size
from tests.storage.test_images import encoded
from tests.storage.test_untrusted import chunk

HOUSE, SKY, WHITE = (200, 40, 40), (60, 150, 220), (255, 255, 255)
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


# --- colour profiles, written by hand --------------------------------------------------------------------------------


def profile_of(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 4."""
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"none", 0x04000000, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def numbers(kind: bytes, *values: float) -> bytes:
    return kind + bytes(4) + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def rgb_profile(columns: NDArray[Any], curve: bytes) -> bytes:
    tags = {name: numbers(b"XYZ ", *column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T)}
    tags[b"wtpt"] = numbers(b"XYZ ", 0.9642, 1.0, 0.8249)
    return profile_of(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def to_linear(levels: NDArray[Any]) -> NDArray[Any]:
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def from_linear(light: NDArray[Any]) -> NDArray[Any]:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


# Columns: XYZ (D50) of red, green and blue.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB_CURVE = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
SRGB_CURVE += numbers(b"", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)[4:]
GAMMA = 563 / 256
PROFILES = {
    "p3": rgb_profile(P3, SRGB_CURVE),
    "adobe": rgb_profile(ADOBE, b"curv" + bytes(4) + struct.pack(">IH", 1, 563)),
    "srgb": rgb_profile(SRGB, SRGB_CURVE),
    "linear grey": profile_of(
        b"GRAY", {b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0), b"wtpt": numbers(b"XYZ ", 0.9642, 1.0, 0.8249)}
    ),
}


def as_stored(colour: tuple[int, ...], profile: str) -> tuple[int, ...]:
    """What a file with the profile holds for a colour of sRGB."""
    light = to_linear(np.array(colour) / 255)
    if profile == "p3":
        levels = from_linear(np.linalg.solve(P3, SRGB @ light))
    elif profile == "adobe":
        levels = np.linalg.solve(ADOBE, SRGB @ light).clip(0, 1) ** (1 / GAMMA)
    else:
        levels = light if profile == "linear grey" else from_linear(light)
    return tuple(int(level) for level in (levels * 255).round())


def ink_profile() -> bytes:
    """A CMYK profile in which each of the 16 mixtures of full inks has a colour of its own; black ink makes black."""
    corners = [(0, 128, 128) if black else lab8(*ink_colour(c, m, y)) for c, m, y, black in mixtures()]
    table = struct.pack(">4sIBBBB", b"mft1", 0, 4, 3, 2, 0) + struct.pack(
        ">9i", *(np.eye(3).ravel() * 65536).astype(int)
    )
    table += bytes(range(256)) * 4 + bytes(itertools.chain(*corners)) + bytes(range(256)) * 3
    return profile_of(b"CMYK", {b"A2B0": table, b"wtpt": numbers(b"XYZ ", 0.9642, 1.0, 0.8249)}, b"prtr")


def mixtures() -> list[tuple[int, ...]]:
    return list(itertools.product((0, 1), repeat=4))


def ink_colour(cyan: int, magenta: int, yellow: int) -> tuple[int, ...]:
    """Colours in sRGB that are not those of a naive conversion."""
    return (255 - 200 * cyan, 255 - 180 * magenta, 255 - 160 * yellow)


def lab8(*colour: int) -> tuple[int, ...]:
    """A colour of sRGB in CIELAB (D50), in 8 bits per channel."""
    x, y, z = SRGB @ to_linear(np.array(colour) / 255) / (0.9642, 1.0, 0.8249)
    fx, fy, fz = (np.cbrt(t) if t > 216 / 24389 else (t * 24389 / 27 + 16) / 116 for t in (x, y, z))
    return round((116 * fy - 16) * 2.55), round(500 * (fx - fy)) + 128, round(200 * (fy - fz)) + 128


# --- depth -----------------------------------------------------------------------------------------------------------


def grey16(mode: str, levels: NDArray[np.uint16]) -> Image.Image:
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, levels.shape[::-1], levels.astype(order).tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_keep_their_values(mode: str) -> None:
    image = grey16(mode, RAMP * 257)
    files = [encoded(grey16("I;16", RAMP * 257), kind) for kind in ("PNG", "TIFF")]
    if mode in ("I;16", "I;16B", "I;16L"):
        files += [encoded(image, "TIFF"), encoded(image, "TIFF", compression="tiff_lzw")]
    decoded = [decode_image(data, "x") for data in files] + [convert_image(image, "x")]
    for result in decoded:
        for channel in np.asarray(result).transpose(2, 0, 1):
            assert (channel == RAMP).all()


def test_one_transparent_level_of_sixteen_bits_is_white() -> None:
    data = encoded(grey16("I;16", RAMP * 257), "PNG", transparency=7 * 257)
    expected = np.where(RAMP == 7, 255, RAMP)
    assert (np.asarray(decode_image(data, "x"))[..., 0] == expected).all()
    other = encoded(grey16("I;16", RAMP * 257), "PNG", transparency=7 * 257 + 1)  # no pixel has this level
    assert (np.asarray(decode_image(other, "x"))[..., 0] == RAMP).all()


def tiff(tags: dict[int, list[int]], data: bytes) -> bytes:
    """A TIFF of little-endian 32-bit values, whose only strip is `data` unless tags say something else."""
    tags = {273: [8], 279: [len(data)], **tags}
    place = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, beside = b"", b""
    for tag, values in sorted(tags.items()):
        value = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            value, beside = struct.pack("<I", place + len(beside)), beside + value
        entries += struct.pack("<HHI", tag, 4, len(values)) + value
    return (
        struct.pack("<4sI", b"II*\0", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + beside
    )


def test_kinds_of_grey_that_only_tiff_has() -> None:
    four = {256: [4], 257: [1], 259: [1], 277: [1]}
    black_last = tiff({**four, 258: [16], 262: [0]}, struct.pack("<4H", 0, 257, 50 * 257, 65535))
    assert np.asarray(decode_image(black_last, "x"))[0, :, 0].tolist() == [255, 254, 205, 0]
    twelve = tiff({**four, 258: [12], 262: [1]}, bytes([0x00, 0x01, 0x00, 0x80, 0x0F, 0xFF]))
    assert np.asarray(decode_image(twelve, "x"))[0, :, 0].tolist() == [0, 16, 128, 255]


def test_planes_of_sixteen_bits_keep_their_values() -> None:
    for planes, colour in ((3, 2), (4, 5)):  # RGB, CMYK
        levels = np.array([[200, 100, 0, 255], [40, 150, 1, 255], [30, 220, 2, 255], [0, 0, 0, 0]][:planes])
        strips = {273: [8 + 8 * plane for plane in range(planes)], 279: [8] * planes}
        tags = {256: [4], 257: [1], 258: [16] * planes, 259: [1], 262: [colour], 277: [planes], 284: [2], **strips}
        data = tiff(tags, (levels * 257).astype("<u2").tobytes())
        expected = levels.T[:, :3] if colour == 2 else 255 - levels.T[:, :3]
        assert np.abs(np.asarray(decode_image(data, "x"), int)[0] - expected).max() <= 1


def test_tiffs_that_cannot_be_decoded_are_refused_by_their_header() -> None:
    grey = {256: [4], 257: [1], 258: [8], 259: [1], 262: [1], 277: [1]}
    assert image_size(tiff(grey, bytes(4)), "x") == (1, 4)
    webp = tiff({**grey, 259: [50001]}, bytes(4))
    signed = tiff({**grey, 339: [2]}, bytes(4))
    for data, reason in ((webp, r"compression \(50001\) is not read; save it with LZW"), (signed, "pixels are signed")):
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match=reason):
                look(data, "x")
    with pytest.raises(SampleError, match="it is damaged or cut off"):
        decode_image(tiff({**grey, 273: [9999]}, bytes(4)), "x")


def test_much_text_in_a_png_does_no_harm() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{}" * 2**20, zip=True)
    data = encoded(Image.new("RGB", (8, 8), HOUSE), "PNG", pnginfo=text, icc_profile=PROFILES["srgb"] + bytes(2**21))
    assert image_size(data, "x") == (8, 8)
    assert decode_image(data, "x").getpixel((3, 3)) == HOUSE


def png_of(bits: int, colour: int, line: bytes, transparent: bytes) -> bytes:
    """A PNG of one line of 4 pixels."""
    import zlib

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + line))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent) + pixels + chunk(b"IEND", b"")


def test_the_transparent_colour_of_a_png_of_any_depth_is_white() -> None:
    level = struct.pack(">H", 1)
    assert np.asarray(decode_image(png_of(1, 0, b"\x60", level), "x"))[0, :, 0].tolist() == [0, 255, 255, 0]
    assert np.asarray(decode_image(png_of(1, 0, b"\x60", bytes(2)), "x"))[0, :, 0].tolist() == [255] * 4
    assert np.asarray(decode_image(png_of(2, 0, b"\x1b", level), "x"))[0, :, 0].tolist() == [0, 255, 170, 255]
    assert np.asarray(decode_image(png_of(4, 0, b"\x01\x2f", level), "x"))[0, :, 0].tolist() == [0, 255, 34, 255]
    deep = png_of(16, 2, struct.pack(">12H", *[5000] * 3, *[40000] * 3, *[5000] * 6), struct.pack(">3H", *[40000] * 3))
    assert np.asarray(decode_image(deep, "x"))[0, :, 0].tolist() == [19, 255, 19, 19]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_black_and_white_are_refused(mode: str) -> None:
    image = Image.new(mode, (4, 4), 3)
    data = encoded(image, "TIFF")
    for look in (lambda: decode_image(data, "x"), lambda: image_size(data, "x"), lambda: convert_image(image, "x")):
        with pytest.raises(SampleError, match=r"^x: its pixels are signed, 32-bit .* scale them to 8 or 16 bits$"):
            look()


# --- colour ----------------------------------------------------------------------------------------------------------


def test_wide_gamuts_are_converted_to_srgb() -> None:
    for profile, kind in itertools.product(("p3", "adobe"), ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")):
        assert as_stored(HOUSE, profile) != HOUSE
        image = Image.new("RGB", (16, 16), as_stored(HOUSE, profile))
        data = encoded(image, kind, icc_profile=PROFILES[profile], quality=100)
        result = decode_image(data, "x")
        assert np.abs(np.asarray(result, int) - HOUSE).max() <= 2, (profile, kind)
        assert result.info == {}


def test_pixels_of_srgb_stay_as_they_are() -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    plain = decode_image(encoded(image, "PNG"), "x").tobytes()
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (PROFILES["srgb"], own):
        result = decode_image(encoded(image, "PNG", icc_profile=profile), "x")
        assert result.tobytes() == plain == image.tobytes()
        assert result.info == {}


def test_grey_with_a_profile() -> None:
    expected = (from_linear(np.arange(256) / 255) * 255).round().reshape(16, 16)
    ramp = Image.fromarray(RAMP.astype(np.uint8))
    with_alpha = Image.merge("LA", (ramp, Image.new("L", ramp.size, 255)))
    for image in (ramp, with_alpha, grey16("I;16", RAMP * 257), ramp.convert("RGB")):
        result = decode_image(encoded(image, "PNG", icc_profile=PROFILES["linear grey"]), "x")
        assert np.abs(np.asarray(result, int) - expected[..., None]).max() <= 2
    adobe = np.asarray(decode_image(encoded(ramp, "PNG", icc_profile=PROFILES["adobe"]), "x"), int)
    expected = (from_linear((np.arange(256) / 255) ** GAMMA) * 255).round().reshape(16, 16)
    assert np.abs(adobe - expected[..., None]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str) -> None:
    for inks in mixtures():
        image = Image.new("CMYK", (16, 16), tuple(255 * ink for ink in inks))
        by_profile = decode_image(encoded(image, kind, icc_profile=ink_profile(), quality=100), "x")
        expected = (0, 0, 0) if inks[3] else ink_colour(*inks[:3])
        assert np.abs(np.asarray(by_profile, int) - expected).max() <= 5, inks
        naive = [0 if inks[3] else 255 * (1 - ink) for ink in inks[:3]]
        without = decode_image(encoded(image, kind, quality=100), "x")
        assert np.abs(np.asarray(without, int) - naive).max() <= 2, inks


def test_lab_is_converted() -> None:
    for colour in (HOUSE, SKY, (128, 128, 128), WHITE):
        lightness, a, b = lab8(*colour)
        image = Image.frombytes("LAB", (8, 8), bytes((lightness, a ^ 128, b ^ 128)) * 64)
        for options in ({}, {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()}):
            result = np.asarray(decode_image(encoded(image, "TIFF", **options), "x"), int)
            assert np.abs(result - colour).max() <= 6, colour


def test_a_profile_that_does_not_fit_or_is_damaged_is_ignored() -> None:
    image = Image.new("RGB", (8, 8), HOUSE)
    p3 = PROFILES["p3"]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    link = p3[:12] + b"link" + p3[16:]
    unknown = p3[:16] + b"\xff\xfe\xfd\xfc" + p3[20:]
    for profile in (
        PROFILES["linear grey"],
        ink_profile(),
        lab,
        link,
        unknown,
        p3[:200],
        p3[:130],
        b"x",
        p3[:128] + bytes(300),
    ):
        assert decode_image(encoded(image, "PNG", icc_profile=profile), "x").getpixel((3, 3)) == HOUSE
    grey = Image.new("L", (8, 8), 77)
    assert decode_image(encoded(grey, "PNG", icc_profile=ink_profile()), "x").getpixel((3, 3)) == (77, 77, 77)


def test_threads_may_convert_at_the_same_time() -> None:
    data = encoded(Image.new("RGB", (300, 300), as_stored(HOUSE, "p3")), "PNG", icc_profile=PROFILES["p3"])
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: decode_image(data, str(number)).tobytes(), range(64)))
    assert len(set(results)) == 1


# --- every mode, format, orientation, profile and transparency -------------------------------------------------------

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "AVIF": ("L", "LA", "P", "RGB", "RGBA"),
}
ALPHA = ("LA", "PA", "RGBA")
TURNED = {  # orientation -> the upright pixels as they are stored
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(pixels.swapaxes(0, 1), 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def upright(mode: str) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """32 x 16 px with a house below the left of a sky, in colours that the mode has; and the colour of the house."""
    house, sky = (HOUSE, SKY)
    if mode in ("L", "LA", "I;16", "I;16B"):
        house, sky = (60,) * 3, (150,) * 3
    if mode == "1":
        house, sky = (0,) * 3, WHITE
    pixels = np.full((16, 32, 3), sky, np.uint8)
    pixels[8:, :16] = house
    return pixels, house


def in_mode(pixels: NDArray[np.uint8], mode: str) -> Image.Image:
    rgb = Image.fromarray(np.ascontiguousarray(pixels))
    if mode in ("P", "PA"):
        return rgb.quantize(4, dither=Image.Dither.NONE).convert(mode)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
        assert converted is not None
        return converted
    if mode.startswith("I;16"):
        return grey16(mode, pixels[..., 0].astype(np.uint16) * 257)
    return rgb.convert(mode)


CASES = [(kind, mode) for kind, modes in MODES.items() if kind in (*FORMATS, "MPO") for mode in modes]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 8), st.sampled_from([None, "p3", "adobe", "srgb"]), st.booleans())
def test_every_kind_of_image_gives_its_colours(
    case: tuple[str, str], orientation: int, profile: str | None, transparent: bool
) -> None:
    kind, mode = case
    pixels, house = upright(mode)
    hidden = (pixels == house).all(-1)
    options: dict[str, Any] = {"quality": 100}
    if kind in ("BMP", "GIF"):
        assume(orientation == 1)
        assume(profile is None)
    else:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if profile is not None:
        assume(mode in ("RGB", "RGBA", "P", "PA"))
        options["icc_profile"] = PROFILES[profile]
    shown = [house, tuple(pixels[0, 0])]
    stored = pixels.copy()
    for colour in shown if profile else ():
        stored[(pixels == colour).all(-1)] = as_stored(colour, str(profile))
    image = in_mode(TURNED[orientation](stored), mode)
    expected = pixels.copy()
    if transparent:
        expected[hidden] = WHITE
        opaque = Image.fromarray(np.ascontiguousarray(TURNED[orientation](~hidden)).astype(np.uint8) * 255)
        level = image.getpixel(tuple(np.argwhere(TURNED[orientation](hidden))[0][::-1].tolist()))
        if mode in ALPHA:
            image.putalpha(opaque)
        elif mode == "P" and kind in ("PNG", "GIF", "WEBP", "AVIF"):
            options["transparency"] = level
            image.info["transparency"] = level
        elif kind == "PNG":
            options["transparency"] = level
        else:
            assume(False)
    data = encoded(image, kind, **options)
    result = decode_image(data, "x")
    assert result.mode == "RGB"
    assert result.info == {}
    assert image_size(data, "x") == (result.height, result.width) == pixels.shape[:2]
    lossy = kind in ("JPEG", "MPO", "WEBP", "AVIF", "GIF") or mode in ("LAB", "YCbCr") or profile in ("p3", "adobe")
    difference = np.abs(np.asarray(result, int) - expected)
    assert difference[2:6, 2:-2].max() <= (6 if lossy else 0), "the sky"
    assert difference[10:-2, 2:14].max() <= (6 if lossy else 0), "the house"


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "I;16", "PA", "LAB", "YCbCr", "RGBX"])
def test_images_of_any_mode_in_memory(mode: str) -> None:
    plain = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    pixels, _ = upright("L" if mode == "La" else mode)
    image = in_mode(pixels, plain)
    if plain != mode:
        image = image.convert(mode)
    assert np.abs(np.asarray(convert_image(image, "x"), int) - pixels).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (HOUSE, SKY))
    data = encoded(first, kind, save_all=True, append_images=[second], quality=100)
    assert np.abs(np.asarray(decode_image(data, "x"), int) - HOUSE).max() <= 3


# --- what is refused, and silence ------------------------------------------------------------------------------------


def test_raw_files_of_cameras_and_thumbnails_are_refused() -> None:
    tags = {256: [4], 257: [1], 258: [8], 259: [1], 262: [1], 277: [1]}
    assert decode_image(tiff(tags, b"abcd"), "x").size == (4, 1)
    for extra in ({254: [1]}, {50706: [0x0401]}):
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match="x: a camera's raw file, or a TIFF that begins with a thumbnail"):
                look(tiff({**tags, **extra}, b"abcd"), "x")


def test_a_tile_larger_than_any_image_is_refused() -> None:
    tags = {
        256: [4],
        257: [1],
        258: [8],
        259: [8],
        262: [1],
        277: [1],
        322: [30_000],
        323: [30_000],
        324: [8],
        325: [4],
    }
    for look in (decode_image, image_size):
        with pytest.raises(SampleError, match="too many pixels"):
            look(tiff(tags, b"abcd"), "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_too_many_pixels_of_any_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (32, 32)), kind)
    for limit in (400, 600):  # far over Pillow's limit, and just over it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match=f"more than {limit}"):
                look(data, "x")


def test_suffixes_follow_the_formats() -> None:
    assert not set(SUFFIXES) & set(KNOWN_UNREAD)
    Image.init()
    for suffix in SUFFIXES:
        assert Image.EXTENSION[suffix].replace("MPO", "JPEG").replace("DIB", "BMP") in FORMATS
    assert {".jfif", ".jpe", ".tif", ".tiff", ".bmp", ".gif"} <= set(SUFFIXES)
    assert {".heic", ".psd", ".svg", ".eps", ".cr2"} <= set(KNOWN_UNREAD)
    assert all(suffix == suffix.lower() for suffix in (*SUFFIXES, *KNOWN_UNREAD))


def made_to_be_broken() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    image = Image.effect_noise((24, 16), 50).convert("RGB")
    options = {"exif": exif, "icc_profile": PROFILES["p3"]}
    files = {kind: encoded(image, kind, **options) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")}
    files |= {kind: encoded(image, kind) for kind in ("BMP", "GIF")}
    files["MPO"] = encoded(image, "MPO", save_all=True, append_images=[image])
    files |= {name: encoded(image, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")}
    files["deep"] = encoded(grey16("I;16", RAMP), "PNG", transparency=5)
    files["deep TIFF"] = encoded(grey16("I;16", RAMP), "TIFF")
    files["palette"] = encoded(image.quantize(16), "PNG", transparency=bytes(range(16)))
    return files


BROKEN = made_to_be_broken()


def test_the_fourth_byte_of_a_bmp_that_is_zero_everywhere_is_no_transparency() -> None:
    def bmp(alpha: int) -> bytes:
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
        head = struct.pack("<IiiHHIIiiII", 124, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks
        pixels = bytes((*HOUSE[::-1], 0, *SKY[::-1], alpha))
        return b"BM" + struct.pack("<IHHI", 14 + len(head) + 8, 0, 0, 14 + len(head)) + head + pixels

    assert np.asarray(decode_image(bmp(0), "x"))[0].tolist() == [list(HOUSE), list(SKY)]
    assert np.asarray(decode_image(bmp(255), "x"))[0].tolist() == [list(WHITE), list(SKY)]


@pytest.mark.parametrize("options", [{}, {"transparency": 1}])
def test_what_the_first_frame_of_a_gif_does_not_cover_is_white(options: dict[str, int]) -> None:
    frame = Image.new("P", (4, 4))
    frame.putpalette([*HOUSE, *SKY])
    frame.putpixel((1, 0), 1)
    data = encoded(frame, "GIF", **options)
    wider = decode_image(data[:6] + struct.pack("<HH", 8, 4) + data[10:], "x")
    assert wider.size == (8, 4)
    assert [wider.getpixel((x, 0)) for x in (0, 1, 3, 4, 7)] == [HOUSE, WHITE if options else SKY, HOUSE, WHITE, WHITE]


def test_whatever_is_broken_is_one_short_reason_and_silence(capfd: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(sorted(BROKEN)),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.integers(0, 12)), min_size=1, max_size=5),
        st.booleans(),
    )
    def check(name: str, changes: list[tuple[float, int, int]], cut: bool) -> None:
        data = bytearray(BROKEN[name])
        for place, value, length in changes:  # a flip, a splice or a gap
            start = int(place**2 * (len(data) - 1))  # rather in the header
            data[start : start + (length if value % 2 else 1)] = bytes([value]) * (1 if value % 3 else length)
        content = bytes(data[: int(changes[0][0] * len(data))] if cut else data)
        found: list[Any] = []
        for look in (decode_image, image_size, decode_image):
            try:
                found.append(look(content, "x"))
            except SampleError as error:
                found.append(str(error))
                assert str(error).startswith("x: ")  # noqa: PT017  (either outcome is right)
                assert "0x" not in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
        if isinstance(found[0], Image.Image):
            assert found[1] == found[0].size[::-1]
            assert found[2].tobytes() == found[0].tobytes()
        else:
            assert found[0] == found[2]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the filter that images.py sets holds outside of pytest
        warnings.filterwarnings("ignore", module=r"PIL\.")
        check()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_a_file_that_was_cut_off_is_refused_by_the_one_that_plans(kind: str) -> None:
    """Planning reads the size. What it takes can be decoded later."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    assert image_size(data, "x") == (48, 64)
    for length in (len(data) - 1, *(len(data) * part // 20 for part in range(1, 20))):
        outcomes = []
        for read in (image_size, decode_image):
            try:
                read(data[:length], "x")
                outcomes.append("taken")
            except SampleError:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1], (kind, length, len(data))
    assert outcomes == ["refused", "refused"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_corrupt_exif_is_left_out(kind: str) -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage and more garbage", b"\xff" * 40):
        data = encoded(Image.new("RGB", (24, 16), HOUSE), kind, exif=exif, quality=100)
        assert image_size(data, "x") == (16, 24)
        assert np.abs(np.asarray(decode_image(data, "x"), int) - HOUSE).max() <= 2


def test_nothing_is_written_to_the_terminal(tmp_path: Any) -> None:
    """Corrupt EXIF, odd palettes, many pixels, damaged TIFFs: Pillow would warn, and libtiff write to stderr."""
    good = BROKEN["JPEG"]
    place = good.index(b"Exif\0\0") + 6
    files = {
        "exif": good[: place + 8] + b"\xff\x00" + good[place + 10 :],
        "no exif": good[:place] + b"\xff" * 12 + good[place + 12 :],
        "palette": BROKEN["palette"],
        "mpo": BROKEN["MPO"].replace(b"MPF\0", b"MPF\0\xff\xff", 1),
        "lzw": BROKEN["tiff_lzw"][:8] + b"\xff" * 40 + BROKEN["tiff_lzw"][48:],
        "channels": tiff({256: [4], 257: [1], 258: [8], 259: [1], 262: [1], 277: [70]}, b"abcd"),
        "large": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 11_000, 11_000, 8, 0, 0, 0, 0)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = """
import sys
from pathlib import Path
from resmaster_stages.storage.images import decode_image
from resmaster_stages.errors import SampleError
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, decode_image(path.read_bytes(), path.name).size)
    except SampleError:
        print(path.name, "no")
"""
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    outcome = dict(line.rsplit(" (", 1) if "(" in line else line.rsplit(" ", 1) for line in run.stdout.splitlines())
    assert outcome.keys() == files.keys()
    assert [name for name, told in outcome.items() if told == "no"] == ["channels", "large", "lzw"]
    assert run.stderr == ""
    assert logging.getLogger("PIL.TiffImagePlugin").level == logging.CRITICAL


def test_only_named_decoders_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(FORMATS) <= {"PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JXL"}
    called = []
    for name, (factory, accept) in list(Image.OPEN.items()):
        if name not in FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: called.append(name), accept))
        del factory
    for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "DDS"):
        data = encoded(Image.new("RGB", (16, 16)), kind)
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match=f"it is none of {images.FORMATS_READ}, or damaged"):
                look(data, "x.png")
    assert called == []
