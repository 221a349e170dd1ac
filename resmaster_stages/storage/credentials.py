"""Finds content credentials (C2PA) that are embedded in image files, by their bytes alone.

Nothing is parsed or checked. `publish.credentials` reads, checks and signs with the library of C2PA. Credentials that a
file only links to are not found.

Invariant: what is found does not depend on what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_JXL = b"\0\0\0\x0cJXL \r\n\x87\n"
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
_APP11, _START_OF_SCAN = 0xEB, 0xDA


def embedded_credentials(data: bytes) -> bytes:
    """The manifest store of an image file of any format that datasets read or write; b"" if there is none."""
    if data.startswith(_PNG):
        return next((content for kind, content in _chunks(data) if kind == b"caBX"), b"")
    if data.startswith(_JPEG):
        return _of_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return next((content for kind, content in _riff(data) if kind == b"C2PA"), b"")
    if data.startswith(_JXL):
        return next((whole for kind, whole, _ in _boxes(data) if kind == b"jumb" and b"c2pa" in whole[:64]), b"")
    if data[4:8] == b"ftyp":
        found = (content for kind, _, content in _boxes(data) if kind == b"uuid" and content.startswith(_C2PA_UUID))
        return _of_uuid(next(found, b""))
    return b""


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a PNG."""
    place = len(_PNG)
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        place += 12 + size


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a RIFF file."""
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(kind, the whole box, its content) of the boxes of a file in the way of ISO media files."""
    place = 0
    while place + 8 <= len(data):
        size, kind, head = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        end = len(data) if size < head else place + size  # 0: to the end of the file
        yield kind, data[place:end], data[place + head : end]
        place = end


def _of_jpeg(data: bytes) -> bytes:
    """The manifest store in the segments APP11 of a JPEG. Each repeats the head of the box that it continues."""
    found, place, number = b"", len(_JPEG), b""
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _START_OF_SCAN:
        size = int.from_bytes(data[place + 2 : place + 4], "big")
        content = data[place + 4 : place + 2 + size]
        if data[place + 1] == _APP11 and content.startswith(b"JP"):
            if not found and content[12:16] == b"jumb" and b"c2pa" in content[:96]:
                found, number = content[8:], content[2:4]
            elif found and content[2:4] == number:
                found += content[16:]
        place += 2 + size
    return found


def _of_uuid(content: bytes) -> bytes:
    """The manifest store in the box `uuid` of an AVIF: after the box's name, version, purpose and an offset."""
    head = len(_C2PA_UUID) + 4
    end = content.find(b"\0", head)
    purpose = content[head:end] if end > 0 else b""
    return content[end + 9 :] if purpose == b"manifest" else b""
