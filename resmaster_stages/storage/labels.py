"""Writes what an image file says of itself beside its pixels: who made it, and with which parameters.

- XMP holds the digital source type, model and prompt, by the names of the IPTC Photo Metadata Standard (2025.1).
- The text that A1111 writes is in a PNG's text chunk `parameters`, and in the EXIF field UserComment of other formats.

Invariant: the bytes follow from the label alone. No time, host, path or version of a program is in them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape

from PIL import PngImagePlugin

from resmaster_stages.config.image_format import ImageFormat

TOOL = "ResMaster Pipeline"
"""The name of this software in files. Its version would change bytes with every release."""
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
"""The vocabulary of digital source types. Its terms follow."""

_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_APART = re.compile(r'[,:"\s]+')
"""Characters that would end a setting."""
_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_BEFORE_EXIF = {"jxl": bytes(4), "jpeg": b"Exif\0\0"}
"""What encoders leave to their callers: JPEG XL counts an offset before EXIF, and JPEG names it."""
_EXIF_IFD, _USER_COMMENT, _LONG, _UNDEFINED = 0x8769, 0x9286, 4, 7


@dataclass(frozen=True)
class Label:
    """What an image file says of itself."""

    source_type: str
    """The term of `SOURCE_TYPES`, such as `trainedAlgorithmicMedia`."""
    model: str = ""
    """The model that drew it; "" if none did."""
    prompt: str = ""
    parameters: str = ""
    """The text that A1111 writes (`parameters`); "" for none."""


def parameters(prompt: str, negative_prompt: str, values: dict[str, object]) -> str:
    """Prompts, each in one line, and settings as A1111 writes and reads them. ComfyUI reads the text if it has a line
    for the negative prompt, even an empty one, and if no setting holds a comma or a colon."""
    settings = ", ".join(f"{name}: {_APART.sub(' ', str(value)).strip()}" for name, value in values.items())
    return f"{' '.join(prompt.split())}\nNegative prompt: {' '.join(negative_prompt.split())}\n{settings}"


def label_options(label: Label, image_format: ImageFormat | Literal["jpeg"]) -> dict[str, Any]:
    """What Pillow's encoder of a format takes to write a label."""
    xmp = xmp_packet(label)
    if image_format == "png":
        info = PngImagePlugin.PngInfo()
        if label.parameters:
            info.add_text("parameters", label.parameters)  # iTXt if it is not Latin-1, as A1111 has it
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return {"pnginfo": info}
    if not label.parameters:
        return {"xmp": xmp}
    return {"xmp": xmp, "exif": _BEFORE_EXIF.get(image_format, b"") + user_comment(label.parameters)}


def xmp_packet(label: Label) -> bytes:
    """The XMP packet of a label."""
    fields = {
        "xmp:CreatorTool": TOOL,
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPES + label.source_type,
        "Iptc4xmpExt:AISystemUsed": label.model,
        "Iptc4xmpExt:AIPromptInformation": label.prompt,
    }
    names = " ".join(f'xmlns:{name}="{address}"' for name, address in _NAMESPACES.items())
    lines = "".join(f"<{name}>{_xml(value)}</{name}>\n" for name, value in fields.items() if value)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {names}><rdf:Description rdf:about="">\n'
        f'{lines}</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="r"?>'
    ).encode()


def _xml(text: str) -> str:
    """`text` in XML. Characters that XML cannot hold become U+FFFD."""
    return escape(_NO_XML.sub("\ufffd", text))


def user_comment(text: str) -> bytes:
    """EXIF that holds nothing but a UserComment, in UTF-16 as A1111 writes it; big-endian throughout."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first, second = 8, 8 + 2 + 12 + 4
    pointer = struct.pack(">HHHIII", 1, _EXIF_IFD, _LONG, 1, second, 0)
    field = struct.pack(">HHHIII", 1, _USER_COMMENT, _UNDEFINED, len(comment), second + 2 + 12 + 4, 0)
    return b"MM\0*" + struct.pack(">I", first) + pointer + field + comment
