"""Gives the images of samples to a browser: as they are stored, as thumbnails, and as tiles of a Deep Zoom pyramid.

An image is fetched by one range read of its tar, at the place that the manifest names.

Invariants:
- An image is decoded once for all who ask for it at the same time.
- Decoded images are held within `DECODED_BYTES`, so two of 8192 x 8192 px; a larger image is held alone. Those that are
  being decoded take at most `DECODING_BYTES` more, or one image.
- Thumbnails and tiles are files of a scratch folder, within `DISK_BYTES`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import SampleError, ShardError
from resmaster_stages.gallery.caches import Budget, Kept, KeptOnDisk
from resmaster_stages.gallery.errors import NotThere, Unreadable, told
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.images import decode_image

DECODED_BYTES = 640 << 20
DECODING_BYTES = 1 << 30
DISK_BYTES = 1 << 30
PX_BYTES = 4
"""What Pillow takes for a pixel of RGB."""
DECODING_PX_BYTES = 16
"""What decoding takes for a pixel at its peak, measured: the decoder's own pixels, their copy and what they become."""
BLOCK_BYTES = 64 << 20
"""Pillow allocates pixels in blocks of this size. The C library gives blocks beyond 32 MiB back to the system when they
are freed. Smaller ones it keeps, so memory would grow with the number of images."""
THUMB_PX = (512, 256, 128)
"""Longer sides of thumbnails. The smaller ones are made from the largest."""
TILE_PX = 512
TILE_QUALITY, THUMB_QUALITY = 90, 85
PIECE_BYTES = 4 << 20
"""A stored file is sent in pieces of this size."""
MEDIA_TYPES = {
    "webp": "image/webp",
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "avif": "image/avif",
    "jxl": "image/jxl",
}

Kind = Literal["low", "high"]
PREFIXES: dict[str, str] = {"low": "low_res", "high": "high_res"}
PLACE_COLUMNS = [
    *(f"{prefix}_{what}" for prefix in PREFIXES.values() for what in ("object", "member", "offset", "bytes")),
    *("low_res_height", "low_res_width", "height", "width"),
]
"""Columns of the manifest that `places` reads."""


@dataclass(frozen=True)
class Place:
    """Where an image lies, and how large it is."""

    object: str
    """Name of the tar, relative to the dataset."""
    member: str
    offset: int
    bytes: int
    height: int
    width: int

    @property
    def media_type(self) -> str:
        """By the extension of the file's name. Only types of images are named."""
        return MEDIA_TYPES.get(self.member.rpartition(".")[2], "application/octet-stream")

    @property
    def top_level(self) -> int:
        """The level of the pyramid at full size. Each level below is half as large, rounded up; level 0 is 1 px."""
        return (max(self.height, self.width) - 1).bit_length()

    def tiles(self, level: int) -> tuple[int, int]:
        """(columns, rows) of the tiles of a level."""
        unit = TILE_PX << (self.top_level - level)
        return -(-self.width // unit), -(-self.height // unit)


def places(row: Mapping[str, Any]) -> dict[str, Place]:
    """The places of a sample's low-res and high-res image, by kind, from its row of the manifest."""
    sizes = {"low": (row["low_res_height"], row["low_res_width"]), "high": (row["height"], row["width"])}
    return {
        kind: Place(
            object=row[f"{prefix}_object"],
            member=row[f"{prefix}_member"],
            offset=row[f"{prefix}_offset"],
            bytes=row[f"{prefix}_bytes"],
            height=sizes[kind][0],
            width=sizes[kind][1],
        )
        for kind, prefix in PREFIXES.items()
    }


def version(found: Mapping[str, Place]) -> str:
    """A short text that changes with a sample's images. It makes addresses of images unique, so that a browser may
    keep the images."""
    text = repr(sorted((kind, place.object, place.offset, place.bytes) for kind, place in found.items()))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


class Images:
    """The images of a dataset."""

    def __init__(self, dataset: Dataset, scratch: Path) -> None:
        self._dataset = dataset
        Image.core.set_block_size(BLOCK_BYTES)
        self._decoded: Kept[Image.Image] = Kept(DECODED_BYTES, lambda image: image.width * image.height * PX_BYTES)
        self._decoding = Budget(DECODING_BYTES)
        self._files = KeptOnDisk(scratch, DISK_BYTES)

    def pieces(self, place: Place) -> Iterator[bytes]:
        """The stored file in pieces. Raises NotThere or Unreadable."""
        for start in range(0, place.bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, place.bytes - start)
            yield self._read(place, place.offset + start, size)

    def thumb(self, place: Place, px: int) -> bytes:
        """The image as JPEG, its longer side at most `px` (of `THUMB_PX`)."""
        return self._files.get(f"{place.object}@{place.offset} thumb {px}", lambda: self._thumb(place, px))

    def tile(self, place: Place, level: int, column: int, row: int) -> bytes:
        """A tile of the pyramid as JPEG. Raises NotThere for one that the pyramid does not have."""
        if not 0 <= level <= place.top_level or column >= place.tiles(level)[0] or row >= place.tiles(level)[1]:
            raise NotThere(f"the image has no tile {column}_{row} of level {level}; reload the page")
        name = f"{place.object}@{place.offset} tile {level} {column} {row}"
        return self._files.get(name, lambda: self._tile(place, level, column, row))

    def _thumb(self, place: Place, px: int) -> bytes:
        if px != THUMB_PX[0]:
            image = _loaded(self.thumb(place, THUMB_PX[0]))
        else:
            image = self._decoded.peek((place, place.top_level)) or self._decode(place)
        scale = min(1.0, px / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return _jpeg(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), THUMB_QUALITY)

    def _tile(self, place: Place, level: int, column: int, row: int) -> bytes:
        image = self._level(place, level)
        x, y = column * TILE_PX, row * TILE_PX
        box = (x, y, min(x + TILE_PX, image.width), min(y + TILE_PX, image.height))
        return _jpeg(image.crop(box), TILE_QUALITY)

    def _level(self, place: Place, level: int) -> Image.Image:
        """A level of the pyramid: the image itself, or half of the level above."""
        if level == place.top_level:
            return self._decoded.get((place, level), lambda: self._decode(place))
        return self._decoded.get((place, level), lambda: self._level(place, level + 1).reduce(2))

    def _decode(self, place: Place) -> Image.Image:
        with self._decoding.hold(place.height * place.width * DECODING_PX_BYTES + place.bytes):
            data = b"".join(self.pieces(place))
            try:
                image = decode_image(data, place.member)
            except SampleError as error:
                url = quoted(self._dataset.url)
                mend = f"run: resmaster verify {url}, then: resmaster repair {url}"
                reason = str(error).rpartition("; ")[0]  # without advice for images that a user gave
                raise Unreadable(f"{place.object}: {reason}; {mend}") from error
        if image.size != (place.width, place.height):
            raise Unreadable(
                f"{place.object}: {place.member} has {image.width} x {image.height} px, and its manifest says "
                f"{place.width} x {place.height}; run: resmaster publish {quoted(self._dataset.url)}"
            )
        return image

    def _read(self, place: Place, offset: int, size: int) -> bytes:
        with told(self._dataset, place.object):
            data = self._dataset.folder.read_part(place.object, offset, size)
            if len(data) < size:
                raise ShardError(f"{place.object}: cut off inside {place.member}")
        return data


def _loaded(data: bytes) -> Image.Image:
    """A thumbnail of ours."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Without subsampling of colours, because people judge colours by it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
