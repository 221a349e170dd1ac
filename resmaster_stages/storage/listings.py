"""Lists and reads what lies in a folder of the user's, or in a WebDataset tar.

Invariants:
- Nothing is opened before it is known to be a regular file. Of a tar, only headers are read for the list.
- What is wrong with one entry is told of that entry (`Entry.problem`, SampleError). An error of an object store is no
  property of an entry, so it is raised.
- Hidden things are left out: names that begin with a dot, alone or as a folder of the path, and `__MACOSX`.
- `parse_source` is the inverse of `spell_source`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from resmaster_stages.errors import SampleError
from resmaster_stages.storage.filesystem import Folder, open_regular
from resmaster_stages.storage.shards import BAD_TAR, members
from resmaster_stages.storage.store_errors import explained

AHEAD_BYTES = 5 << 20
"""What is fetched at a time of a tar in an object store."""
MEMBER_KINDS = "is a link, a device or a sparse file in the tar; put the file itself there"

_MARK = re.compile(r"\.tar#", re.IGNORECASE)
_LIKE_A_MARK = re.compile(r"(?<=\.tar)(?:#|%(?:25)*23)", re.IGNORECASE)
_ESCAPED_MARK = re.compile(r"(?<=\.tar)%((?:25)*23)", re.IGNORECASE)

_REASONS = {
    errno.ENOENT: "is gone",
    errno.EACCES: "cannot be read: permission denied",
    errno.EPERM: "cannot be read: permission denied",
    errno.ELOOP: "is a link to itself",
}


def spell_source(url: str, member: str | None = None) -> str:
    """The source of a file at `url`, or of a member of the tar at `url`: `{url}` or `{url}#{member}`.

    A tar's url ends in `.tar`. In the url itself, `.tar#` is spelled `.tar%23`, and `.tar%23` is spelled `.tar%2523`.
    """
    plain = _LIKE_A_MARK.sub(lambda found: "%23" if found[0] == "#" else f"%25{found[0][1:]}", url)
    return plain if member is None else f"{plain}#{member}"


def parse_source(source: str) -> tuple[str, str | None]:
    """(url, member of the tar at that url or None) of a source."""
    mark = _MARK.search(source)
    url, member = (source[: mark.end() - 1], source[mark.end() :]) if mark else (source, None)
    return _ESCAPED_MARK.sub(lambda found: "#" if found[1] == "23" else f"%{found[1][2:]}", url), member


class Entry(NamedTuple):
    """What a list tells of a name. The names of folders end in a slash."""

    bytes: int = 0
    problem: str = ""
    """Why it cannot be read; "" if it can."""
    offset: int = 0
    """Place of the first byte in the tar."""


@dataclass(frozen=True)
class FolderListing:
    """What lies in a folder, at any depth: name -> entry, sorted by name."""

    place: Folder
    entries: dict[str, Entry]
    repeated: tuple[str, ...] = ()

    def source(self, name: str) -> str:
        """The source of a file in the folder."""
        return spell_source(self.place.url_of(name.rstrip("/")))

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file. Raises SampleError if this file cannot be read or has more than `limit` bytes."""
        return read_whole(self.place, name, limit) if self.place.local or self.entries[name].bytes else b""

    def leads_out(self, name: str) -> str:
        """Why a file may not be read; "" if it may be read."""
        return leads_out(self.place, name)


@dataclass(frozen=True)
class TarListing:
    """What lies in an open tar: name -> entry, sorted by name. Of members with one name, the first is meant."""

    url: str
    file: IO[bytes]
    remote: bool
    entries: dict[str, Entry]
    repeated: tuple[str, ...]
    """Names that come again."""

    def source(self, name: str) -> str:
        """The source of a member."""
        return spell_source(self.url, name.rstrip("/"))

    def read(self, name: str, limit: int) -> bytes:
        """The content of a member. Raises SampleError if the file has become shorter."""
        entry = self.entries[name]
        try:
            self.file.seek(entry.offset)
            data = self.file.read(entry.bytes)
        except OSError as error:
            if self.remote:
                raise
            raise SampleError(reason_of(error)) from error
        if len(data) < entry.bytes:
            raise SampleError("is cut off: the tar has become shorter")
        return data

    def leads_out(self, name: str) -> str:
        """A member leads nowhere."""
        return ""


def list_folder(place: Folder) -> FolderListing | None:
    """What lies in a folder. None if there is no such folder. Raises the errors of the store, or of the folder."""
    with explained(place.url):
        if not place.exists(""):
            return None
        if place.local:
            found = dict(_on_disk(place.path))
        else:
            listed = ((file.name, file.bytes) for file in place.files() if not _hidden(file.name))
            found = {name: Entry(size, _astray(name)) for name, size in listed}
    return FolderListing(place, dict(sorted(found.items())))


@contextmanager
def opened_tar(place: Folder, name: str) -> Iterator[TarListing]:
    """The list of an uncompressed tar, which stays open in the block. Raises SampleError if the tar cannot be read."""
    url = place.url_of(name)
    with ExitStack() as stack:
        if not place.local:
            stack.enter_context(explained(url))
        try:
            file = stack.enter_context(open_regular(place.full(name)) if place.local else place.open(name, AHEAD_BYTES))
            entries, repeated = _members(file)
        except FileNotFoundError as error:
            raise SampleError("no such file; give a folder of images, or WebDataset .tar files") from error
        except BAD_TAR as error:
            raise SampleError(f"not a readable tar ({error}); copy it again or leave it out") from error
        except OSError as error:
            if not place.local:
                raise
            raise SampleError(reason_of(error)) from error
        yield TarListing(url, file, not place.local, entries, repeated)


def read_whole(place: Folder, name: str, limit: int) -> bytes:
    """The content of a file. Raises SampleError if this one file cannot be read or has more than `limit` bytes."""
    try:
        data = place.read_part(name, 0, limit + 1)
    except OSError as error:
        if not place.local and not isinstance(error, FileNotFoundError):
            raise
        raise SampleError(reason_of(error)) from error
    if len(data) > limit:
        raise SampleError(f"has more than {limit:,} bytes")
    return data


def reason_of(error: OSError) -> str:
    """Why one file cannot be read, in a few words that follow its name."""
    if isinstance(error, FileNotFoundError):
        return _REASONS[errno.ENOENT]
    if error.errno is None:
        return str(error)
    return _REASONS.get(error.errno) or f"cannot be read: {os.strerror(error.errno)}"


def leads_out(place: Folder, name: str) -> str:
    """Why a local file may not be read: it is a link that leads out of the folder. "" if it may be read."""
    if not place.local or _inside(place.full(name), place.path):
        return ""
    return f"{name.rsplit('/', 1)[-1]} is a link that leads out of the folder; put the file itself there"


def _inside(path: str, folder: str) -> bool:
    """Whether a path, with all links followed, is in a folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder or "/"))


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def _astray(name: str) -> str:
    """Why the name of an object in a store cannot be a path in a folder; "" if it can."""
    parts = name.split("/")
    return "its name leads out of the folder; rename it" if ".." in parts or parts[0] == "" else ""


def _on_disk(root: str) -> Iterator[tuple[str, Entry]]:
    """What lies in a folder on this machine's disk. Links to files are followed, links to folders are not."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(f"{root}/{folder}") as found:
                for item in found:
                    if _hidden(item.name):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        waiting.append(f"{folder}{item.name}/")
                        yield f"{folder}{item.name}/", Entry()
                    else:
                        slash, entry = _entry_of(item, root)
                        yield f"{folder}{item.name}{slash}", entry
        except OSError as error:
            if not folder:
                raise
            yield folder, Entry(problem=f"{reason_of(error)}; what lies in it is not taken")


def _entry_of(item: os.DirEntry[str], root: str) -> tuple[str, Entry]:
    """("/" for a folder, else "", entry) of a file, of a link, or of something else on the disk."""
    try:
        facts = item.stat()
    except OSError as error:
        link_to_nothing = item.is_symlink() and isinstance(error, FileNotFoundError)
        return "", Entry(problem="is a link to nothing" if link_to_nothing else reason_of(error))
    if stat.S_ISREG(facts.st_mode):
        return "", Entry(facts.st_size)
    if not stat.S_ISDIR(facts.st_mode):
        return "", Entry(problem="is no regular file")
    target = os.path.relpath(os.path.realpath(item.path), os.path.realpath(root or "/"))
    if target.split("/")[0] == ".." or (target != "." and _hidden(target)):
        return "/", Entry(
            problem="is a link to a folder elsewhere; put that folder itself here, or give it as the source"
        )
    return "/", Entry(problem="is a link to a folder of the same source, whose images are taken where they lie")


def _members(file: IO[bytes]) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """(name -> entry, names that come again) of a tar. Raises the errors in `BAD_TAR`, also if the tar is cut off."""
    found: dict[str, Entry] = {}
    repeated: list[str] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in members(tar):
            name = f"{info.name}/" if info.isdir() else info.name
            if _hidden(name):
                continue
            if name in found:
                repeated.append(name)
                continue
            usable = info.isdir() or (info.isreg() and not info.issparse())
            found[name] = Entry(info.size, "" if usable else MEMBER_KINDS, info.offset_data)
        file.seek(tar.offset)
    # tarfile takes a damaged header, and the end of a file that was cut off, for the end of the tar
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged or cut off: it has no end mark")
    while piece := file.read(1 << 20):
        if piece.count(0) < len(piece):
            raise tarfile.ReadError("it goes on after its end mark: several tars in one file?")
    return dict(sorted(found.items())), tuple(sorted(repeated))
