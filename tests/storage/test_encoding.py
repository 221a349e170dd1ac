"""The formats in which a dataset's images are written: what is lossless, what fits, and equal bytes everywhere."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resmaster_stages.config.image_format import lossless_format
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.storage import images
from resmaster_stages.storage.images import decode_image, encode_image, image_size, require_writable, why_unstorable
from tests.checkout import PYTHONPATH

FORMATS = ("webp", "png", "avif", "jxl")


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def greatest_error(image: Image.Image, data: bytes) -> int:
    return int(np.abs(np.asarray(decode_image(data, "x"), int) - np.asarray(image)).max())


@pytest.mark.parametrize("image_format", ["webp", "png", "jxl"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (48, 64), (257, 130)])
def test_quality_100_keeps_every_pixel(image_format, size):
    assert greatest_error(noise(*size), encode_image(noise(*size), image_format)) == 0


def test_avif_rounds_colours_at_any_quality():
    """So low-res images of a dataset of AVIF are WebP."""
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    for image in (noise(64, 64), Image.blend(noise(64, 64), smooth, 0.7)):
        assert 0 < greatest_error(image, encode_image(image, "avif")) <= 4
    assert [lossless_format(each) for each in FORMATS] == ["webp", "png", "webp", "jxl"]


@pytest.mark.parametrize("image_format", ["webp", "avif", "jxl"])
def test_a_lower_quality_takes_fewer_bytes_and_loses_more(image_format):
    image = noise(128, 128).resize((512, 512), Image.Resampling.BICUBIC)
    found = [encode_image(image, image_format, quality) for quality in (50, 80, 95)]
    assert [len(data) for data in found] == sorted({len(data) for data in found})
    errors = [np.square(np.asarray(decode_image(data, "x"), float) - np.asarray(image)).mean() for data in found]
    assert errors[0] > errors[1] > errors[2] > 0


def test_colours_have_the_resolution_of_the_image():
    """A column of red beside a column of blue stays red: with a quarter of the colours, both would be purple."""
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    image = Image.fromarray(stripes)
    errors = {name: greatest_error(image, encode_image(image, name, 95)) for name in ("webp", "avif", "jxl")}
    assert max(errors["avif"], errors["jxl"]) < 80
    assert errors["webp"] > 120, "WebP has a quarter of the colours, below 100"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets the cores of a process")
def test_the_bytes_are_the_same_on_any_number_of_cores():
    script = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
from tests.storage.test_encoding import digests
print(digests())
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, cores],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for cores in ("1", "64")
    ]
    assert runs[0] == runs[1] == str(digests())


def digests() -> list[str]:
    """Of an image that encoders cut into parts, in each format and with and without loss."""
    image = noise(90, 160).resize((1600, 900), Image.Resampling.BICUBIC)
    return [
        hashlib.sha256(encode_image(image, image_format, quality)).hexdigest()[:12]
        for image_format in FORMATS
        for quality in (95, 100)
    ]


@pytest.mark.parametrize(("image_format", "longest"), [("webp", 16383), ("avif", 32768)])
def test_the_longest_side_of_a_format_can_be_read_again(image_format, longest):
    image = Image.new("RGB", (longest, 2), "teal")
    assert image_size(encode_image(image, image_format, 50), "x") == (2, longest)
    assert why_unstorable(longest, 2, image_format) == ""
    with pytest.raises(SampleError, match=rf"holds at most {longest} px a side, this is {longest + 1}x2; set image_fo"):
        encode_image(Image.new("RGB", (longest + 1, 2)), image_format)


def test_jpeg_xl_and_png_hold_what_others_do_not():
    for image_format in ("png", "jxl"):
        assert image_size(encode_image(Image.new("RGB", (40_000, 2)), image_format), "x") == (2, 40_000)


def test_a_format_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(images, "FORMATS", ("PNG", "WEBP", "AVIF"))
    for image_format in ("png", "webp", "avif"):
        require_writable(image_format)
    with pytest.raises(ConfigError, match=r"JPEG XL is not installed; pip install 'resmaster-pipeline\[jxl\]', or "):
        require_writable("jxl")


# The decoder of JPEG XL decodes when it opens a file, so the size is read before.


def jxl_header(height: int, width: int) -> bytes:
    """The beginning of a codestream with sides of 30 bits and no ratio, lowest bits first."""
    bits, place = 0, 0
    for value, count in ((0, 1), (3, 2), (height - 1, 30), (0, 3), (3, 2), (width - 1, 30)):
        bits |= value << place
        place += count
    return b"\xff\x0a" + bits.to_bytes(9, "little")


def boxes(*parts: tuple[bytes, bytes]) -> bytes:
    head = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
    return head + b"".join((8 + len(content)).to_bytes(4, "big") + kind + content for kind, content in parts)


def in_a_container(codestream: bytes) -> bytes:
    return boxes((b"Exif", bytes(20)), (b"jxlc", codestream))


def in_crumbs(codestream: bytes) -> bytes:
    """Each byte of the codestream in a box of its own."""
    return boxes(*((b"jxlp", number.to_bytes(4, "big") + bytes([each])) for number, each in enumerate(codestream)))


def to_the_end(codestream: bytes) -> bytes:
    return boxes() + b"\0\0\0\0jxlc" + codestream


def with_a_long_size(codestream: bytes) -> bytes:
    return boxes() + b"\0\0\0\x01jxlc" + (16 + len(codestream)).to_bytes(8, "big") + codestream


@pytest.mark.parametrize("pack", [bytes, in_a_container, in_crumbs, to_the_end, with_a_long_size])
def test_a_jpeg_xl_of_too_many_pixels_is_refused_before_it_is_decoded(pack, monkeypatch):
    opened = []
    factory, accept = Image.OPEN["JXL"]
    monkeypatch.setitem(Image.OPEN, "JXL", (lambda *args: opened.append(1) or factory(*args), accept))
    for look in (decode_image, image_size):
        with pytest.raises(SampleError, match="too many pixels"):
            look(pack(jxl_header(2**29, 2**29) + bytes(8)), "x")
    assert not opened
    with pytest.raises(SampleError, match="not a readable image"):
        decode_image(pack(jxl_header(8, 8) + bytes(8)), "x")
    assert opened, "a size that fits is left to the decoder"


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (48, 64), (256, 256), (24, 1000), (480, 640), (2, 3000), (2600, 520)])
@pytest.mark.parametrize("quality", [95, 100])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size, quality):
    for extra in ({}, {"exif": b"II*\0\x08\0\0\0\0\0\0\0\0\0", "xmp": b"<x/>"}):
        buffer = io.BytesIO()
        noise(*size).save(buffer, "JXL", **images.encoder_options("jxl", quality), **extra)
        assert images._jxl_size(images._jxl_codestream(buffer.getvalue())) == size


def test_a_jpeg_xl_that_was_cut_off_is_refused(tmp_path: Path):
    data = encode_image(noise(48, 64), "jxl")
    for length in (0, 1, 2, 12, 20, len(data) // 2, len(data) - 1):
        for look in (decode_image, image_size):
            with pytest.raises(SampleError, match="x: not a readable image"):
                look(data[:length], "x")
