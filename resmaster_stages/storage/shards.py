"""Reads and writes WebDataset shards: tar files in which the members of one sample, `{key}.{extension}`, are adjacent.

This module works on local files and does not upload them.

Invariants:
- Equal content gives equal bytes: no time, owner or host is in a tar.
- The members of a sample have a fixed order: the image, json, txt, then others by name.
- Nothing is ever extracted to disk, so names in a tar are never used as paths.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from resmaster_stages.errors import ShardError
from resmaster_stages.storage.store_errors import explained

IMAGE_EXTENSIONS = ("webp", "png", "jpg")
"""Extensions that a sample's image may have. A sample has exactly one image."""

BAD_TAR = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError)
"""Errors that tarfile raises for files that are no tar, are cut off, or claim absurd sizes."""

_ORDER = {**dict.fromkeys(IMAGE_EXTENSIONS, 0), "json": 1, "txt": 2}


@dataclass(frozen=True)
class Member:
    """The place of a file in the tar: offset of its first byte, and its length in bytes."""

    name: str
    offset: int
    size: int


@dataclass
class Entry:
    """One sample of a tar: its members by extension."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> tuple[str, Member]:
        """The extension and place of the image. Raises ShardError if there is none."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return extension, self.members[extension]
        raise ShardError(f"sample {self.key} has no image ({', '.join(self.members) or 'nothing'})")


def spell_image(entry: Entry) -> str:
    """The place of a sample's image in its tar as commit records hold it: `{offset}+{bytes}.{extension}`."""
    extension, member = entry.image
    return f"{member.offset}+{member.size}.{extension}"


def parse_image(key: str, text: str) -> Member:
    """The inverse of `spell_image`. Raises ValueError."""
    offset, plus, rest = text.partition("+")
    size, dot, extension = rest.partition(".")
    if not plus or not dot or extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"{text!r} is no place of an image")
    return Member(f"{key}.{extension}", int(offset), int(size))


def following(start: bytes, offset: int, name: str, tar: str) -> Member:
    """The member `name` of a tar, whose header is at `offset` in the tar. start: what begins there.

    Raises ShardError, naming `tar`, if another member or none is there.
    """
    try:
        info = tarfile.TarInfo.frombuf(start[: tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
    except BAD_TAR as error:
        raise ShardError(f"{tar}: {name} is not where it should be ({error})") from error
    if info.name != name or not info.isreg() or info.size < 0:
        raise ShardError(f"{tar}: {name} is not where it should be; {info.name!r} is there")
    return Member(name, offset + tarfile.BLOCKSIZE, info.size)


class ShardWriter:
    """Writes one tar to a local file. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._place = str(path.parent)
        with explained(self._place):
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed in __exit__)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with explained(self._place):
            self._tar.close()

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """Add a sample: extension -> content. Raises ValueError for a key that WebDataset could not read back."""
        if not key or "." in key or "/" in key:
            raise ValueError(f"key {key!r}: no dots, slashes or empty names in WebDataset keys")
        if not files:
            raise ValueError(f"sample {key}: no files")
        for extension in sorted(files, key=lambda name: (_ORDER.get(name, 3), name)):
            info = tarfile.TarInfo(f"{key}.{extension}")  # mtime 0, owner 0: the same bytes every time
            info.size = len(files[extension])
            info.mode = 0o444
            with explained(self._place):
                self._tar.addfile(info, io.BytesIO(files[extension]))


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an untrusted tar, in order. Raises tarfile.ReadError for impossible headers.

    With a negative size, tarfile would go back to an earlier header and never end. The size of a sparse member is not
    the number of bytes stored.
    """
    end = -1
    for info in tar:
        if info.offset <= end or info.size < 0 or info.offset_data < info.offset:
            raise tarfile.ReadError(f"impossible size or place of member {info.name!r}")
        end = info.offset
        yield info


def read_index(file: IO[bytes], name: str) -> list[Entry]:
    """The samples of a tar in order. Reads only the headers. Raises ShardError, naming `name`, if it is damaged."""
    entries: list[Entry] = []
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in members(tar):
                if not info.isreg() or info.issparse():
                    continue
                key, _, extension = info.name.partition(".")
                if not entries or entries[-1].key != key:
                    if key in seen:
                        raise ShardError(f"{name}: sample {key} comes twice")
                    seen.add(key)
                    entries.append(Entry(key))
                entries[-1].members[extension] = Member(info.name, info.offset_data, info.size)
            # tarfile accepts a tar without an end mark, but a tar that is cut off must not pass as a shorter one
            if not _ends_with_zeros(file):
                raise ShardError(f"{name}: the tar is cut off")
    except BAD_TAR as error:
        raise ShardError(f"{name}: not a readable tar ({error})") from error
    return entries


def _ends_with_zeros(file: IO[bytes]) -> bool:
    """Whether a tar ends with the two zero blocks of its end mark."""
    size = 2 * tarfile.BLOCKSIZE
    if file.seek(0, io.SEEK_END) < size:
        return False
    file.seek(-size, io.SEEK_END)
    return file.read(size) == bytes(size)


def read_member(file: IO[bytes], member: Member) -> bytes:
    """The content of a member of a local tar. Does not use or move the file's position, so threads may share it."""
    data = bytearray()
    while len(data) < member.size:  # one call reads at most 2 GiB
        piece = os.pread(file.fileno(), member.size - len(data), member.offset + len(data))
        if not piece:
            raise ShardError(f"{os.path.basename(file.name)}: cut off inside {member.name}")
        data += piece
    return bytes(data)


def validate(path: Path, keys: Iterable[str]) -> list[Entry]:
    """Re-read a tar that was just written, and return its index.

    Raises ShardError unless it holds exactly `keys`, in this order, each with one image and valid JSON.
    """
    expected = list(keys)
    with path.open("rb") as file:
        entries = read_index(file, path.name)
        found = [entry.key for entry in entries]
        if found != expected:
            raise ShardError(f"{path.name}: holds {len(found)} samples, expected {len(expected)} in the plan's order")
        for entry in entries:
            if sum(extension in entry.members for extension in IMAGE_EXTENSIONS) != 1:
                raise ShardError(
                    f"{path.name}: sample {entry.key} needs exactly one image, has {sorted(entry.members)}"
                )
            if not entry.image[1].size:
                raise ShardError(f"{path.name}: the image of sample {entry.key} is empty")
            if "json" not in entry.members:
                raise ShardError(f"{path.name}: sample {entry.key} has no json")
            try:
                json.loads(read_member(file, entry.members["json"]))
            except ValueError as error:
                raise ShardError(f"{path.name}: the json of sample {entry.key} is not JSON ({error})") from error
    return entries
