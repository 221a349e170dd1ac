"""Defines what a format of exports is: how the samples of a shard are written, and which files complete the export.

The file of a format ends with its `Format`, and `resmaster_stages.publish.exports.FORMATS` lists all formats. Choosing,
reading, resizing, resuming and removing are in `export.py`, the same for all formats.

Invariant: importing the list is quick, also for `resmaster status`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from resmaster_stages.storage.filesystem import Folder, is_outside
from resmaster_stages.storage.store_errors import explained

if TYPE_CHECKING:
    from resmaster_stages.dataset.sample import EncodedImage

Row = dict[str, Any]
"""Values of JSON."""


@dataclass(frozen=True)
class Item:
    """One sample as it is exported."""

    key: str
    prompt: str
    image: bytes
    """The high-res image, encoded: the very bytes of the dataset, or a smaller copy as PNG."""
    extension: str
    height: int
    """Size of `image` in px."""
    width: int
    facts: Mapping[str, Any]
    """Name -> value of JSON: key, prompt, sizes, metrics, flags and what people chose."""
    made: Mapping[str, Any]
    """How the image was made: the sample's JSON file in the dataset."""
    low_res: EncodedImage | None = None
    """Only for formats that read stage `low_res`."""
    captions: Sequence[Mapping[str, Any]] = ()
    """Rows of the captions table with boxes in px of the dataset's image. Only for formats that read `captions`."""
    boxes_px: tuple[int, int] = (0, 0)
    """(height, width) in which the boxes of the captions are."""

    @property
    def file(self) -> str:
        """Name of the image's file."""
        return f"{self.key}.{self.extension}"


@dataclass(frozen=True)
class Place:
    """A folder of the export. It holds files until `flush` writes them."""

    folder: Folder
    shard: int = 0
    """Number of the shard whose samples are written."""
    prefix: str = ""
    """The sub-folder in the export, with a slash at its end; "" for the export's own folder."""
    held: dict[str, bytes] = field(default_factory=dict)
    """Name in the export -> content."""

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file, as a whole, at the next `flush`."""
        if is_outside(name):
            raise ValueError(f"{name!r} leads out of the export")
        self.held[f"{self.prefix}{name}"] = data

    def write_lines(self, name: str, lines: Iterable[str], scratch: Path) -> None:
        """Write or replace a text file now. Its lines need not fit into memory. scratch: a folder on this machine."""
        path = scratch / PurePosixPath(name).name
        with explained(str(scratch)), path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        self.folder.upload(f"{self.prefix}{name}", path)
        path.unlink()

    def flush(self) -> None:
        """Write the held files."""
        for name, data in self.held.items():
            self.folder.write(name, data)
        self.held.clear()

    def path(self, name: str) -> str:
        """Where trainers find a folder of the export: an absolute path; on a store, the name in the export."""
        full = f"{self.prefix}{name}"
        return self.folder.url_of(full) if self.folder.local else full


@dataclass(frozen=True)
class Part:
    """All samples of the export in one size."""

    size: int | None
    """About so many px in the square; None: as in the dataset."""
    place: Place
    rows: Callable[[], Iterator[Row]]
    """Gives what `Format.write` gave for the shards, in order. May be called several times."""


@dataclass(frozen=True)
class Format:
    """A format of exports."""

    name: str
    """Users write it after `--as`."""
    readers: str
    """Who reads the format, as a phrase for help and pages."""
    write: Callable[[Iterator[Item], Place], Iterator[Row]]
    """Writes the files of one shard's samples in one size. Yields what `finish` needs, as values of JSON, after each
    sample or group of samples: the memory holds the files since the last yield. Names hold a key or the number of the
    shard, so that shards never share a file."""
    finish: Callable[[Sequence[Part], Place, Path], Sequence[str]]
    """Writes the files that describe the whole, in the parts' places or in that of the export. The last argument is a
    scratch folder. Gives lines for the user."""
    reads: tuple[str, ...] = ()
    """Stages that are read beside `high_res`."""


def text_of(prompt: str) -> bytes:
    """A prompt as the content of a text file that ends with a line break: some trainers refuse an empty file."""
    return f"{prompt}\n".encode()


def json_of(value: Any) -> str:
    """`value` as one line of JSON with sorted keys. Characters beyond ASCII stay."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def value_of(value: Any) -> Any:
    """`value`, or None for a number that JSON cannot hold (infinite or NaN)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_captioned(items: Iterator[Item], place: Place) -> Iterator[Row]:
    """Write images/KEY.png and images/KEY.txt of each sample, as trainers read them. Yields the images' sizes."""
    for item in items:
        place.write(f"images/{item.file}", item.image)
        place.write(f"images/{item.key}.txt", text_of(item.prompt))
        yield {"width": item.width, "height": item.height}
