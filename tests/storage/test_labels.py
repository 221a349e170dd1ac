"""What an image file says of itself: read back by Pillow, by an XML parser, and by the rules of the programs that users
drop images on."""

import io
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from resmaster_stages.storage.images import decode_image, encode_image
from resmaster_stages.storage.labels import SOURCE_TYPES, Label, parameters, xmp_packet

PROMPT, NEGATIVE = 'a "red" <barn> & Häuschen 🏠, Steps: 7', "blurry, ugly: all"
SETTINGS = {"Steps": 20, "Sampler": "DDIM", "CFG scale": 4.5, "Seed": 2**63 - 1, "Size": "48x32", "Model": "a, b: c"}
LABEL = Label("trainedAlgorithmicMedia", "owner/model", PROMPT, parameters(PROMPT, NEGATIVE, SETTINGS))
FORMATS = ("png", "webp", "avif", "jxl")


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def box(data: bytes, kind: bytes) -> bytes:
    """The content of a box of a JPEG XL, which the plugin of Pillow does not give."""
    place = data.index(kind) - 4
    return data[place + 8 : place + int.from_bytes(data[place : place + 4], "big")]


def xmp_of(data: bytes) -> bytes:
    """The XMP packet of an image file."""
    opened = Image.open(io.BytesIO(data))
    return box(data, b"xml ") if opened.format == "JXL" else opened.info["xmp"]


def said(packet: bytes) -> dict[str, str]:
    """The fields of an XMP packet by their full names."""
    description = ElementTree.fromstring(packet.decode()).find(".//{*}Description")
    return {field.tag: field.text for field in description}


def text_of(data: bytes) -> str:
    """The text of the generation parameters, by Pillow."""
    opened = Image.open(io.BytesIO(data))
    if opened.format == "PNG":
        return opened.text["parameters"]
    comment = opened.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_label_is_read_back_and_changes_no_pixel(image_format):
    plain, labelled = encode_image(image(), image_format), encode_image(image(), image_format, label=LABEL)
    assert decode_image(labelled, "x").tobytes() == decode_image(plain, "x").tobytes()
    assert len(labelled) - len(plain) < 2000
    assert said(xmp_of(labelled)) == {
        "{http://ns.adobe.com/xap/1.0/}CreatorTool": "ResMaster Pipeline",
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType": f"{SOURCE_TYPES}trainedAlgorithmicMedia",
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}AISystemUsed": "owner/model",
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}AIPromptInformation": PROMPT,
    }
    assert text_of(labelled) == LABEL.parameters
    assert encode_image(image(), image_format, label=LABEL) == labelled


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_label_without_parameters_has_a_source_and_no_text(image_format):
    data = encode_image(image(), image_format, label=Label("algorithmicallyEnhanced"))
    assert list(said(xmp_of(data)).values()) == ["ResMaster Pipeline", f"{SOURCE_TYPES}algorithmicallyEnhanced"]
    opened = Image.open(io.BytesIO(data))
    assert "parameters" not in opened.info
    assert not opened.getexif()


def test_the_offset_before_exif_of_a_jpeg_xl_is_there_once():
    """As ISO 18181-2 has it. Pillow's plugin writes what it is given."""
    content = box(encode_image(image(), "jxl", label=LABEL), b"Exif")
    assert content[:8] == b"\0\0\0\0MM\0*"


def test_a1111_reads_the_parameters():
    """Its rules: the last line is settings if it holds three; a line that begins so is the negative prompt."""
    *lines, last = LABEL.parameters.split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert found == {**{name: str(value) for name, value in SETTINGS.items()}, "Model": "a b c"}
    assert lines == [PROMPT, f"Negative prompt: {NEGATIVE}"]


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_comfyui_reads_the_parameters(negative):
    """Its rules: nothing is read without both marks, and each piece between commas must hold a colon."""
    text = parameters(PROMPT, negative, SETTINGS)
    settings = text.rfind("\nSteps:")
    assert settings > 0
    values = dict(piece.split(":")[:2] for piece in text[settings:].split("\n")[1].split(","))
    assert {name.strip().lower(): value.strip() for name, value in values.items()}["cfg scale"] == "4.5"
    mark = text.rfind("\nNegative prompt:", 0, settings)
    assert (text[:mark].strip(), text[mark + 18 : settings].strip()) == (PROMPT, negative)


def test_lines_of_a_prompt_cannot_pass_for_settings():
    text = parameters("a\nNegative prompt: b", "c\nSteps: 99, Seed: 1", {"Steps": 20})
    assert text.split("\n") == ["a Negative prompt: b", "Negative prompt: c Steps: 99, Seed: 1", "Steps: 20"]


def test_text_that_xml_cannot_hold_does_not_break_the_packet():
    odd = "a\ufffe b\x01 ]]> <x a='&amp;'> \ud7ff \U0010ffff"
    packet = xmp_packet(Label("trainedAlgorithmicMedia", odd, odd))
    expected = odd.replace("\ufffe", "\ufffd").replace("\x01", "\ufffd")
    assert list(said(packet).values())[2:] == [expected] * 2


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("image_format", FORMATS)
def test_exiftool_reads_everything(image_format, tmp_path: Path):
    path = tmp_path / f"a.{image_format}"
    path.write_bytes(encode_image(image(), image_format, label=LABEL))
    words = ["exiftool", "-b", "-XMP:DigitalSourceType", "-UserComment", "-Parameters", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{SOURCE_TYPES}trainedAlgorithmicMedia{LABEL.parameters}"
    assert done.stderr == ""
