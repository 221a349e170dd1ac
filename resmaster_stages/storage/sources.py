"""Finds and reads the user's own images, in a folder or in WebDataset tars.

All content from outside is untrusted:
- Nothing is extracted to disk, and names are never used as paths. Links, devices and sparse members of tars are
  rejected. At most `MAX_FILE_BYTES` of a file are read.
- Text beside an image is not read through a link that leads out of the folder, because its content would be published.

A source is a path or URL of an image file, or `{tar}#{member}` for an image inside a WebDataset tar.
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from resmaster_stages.errors import PlanError, SampleError
from resmaster_stages.redaction import printable
from resmaster_stages.storage.filesystem import Folder, explained, open_folder
from resmaster_stages.storage.images import SUFFIXES
from resmaster_stages.storage.shards import BAD_TAR, members

MASK_EXTENSION = "detail_mask.png"
"""Extension of the detail mask beside an image, in a folder or a tar."""
MAX_FILE_BYTES = 256 * 2**20
"""Larger image files are rejected unread. At 3 bytes per pixel, this is Pillow's limit of pixels, uncompressed."""
MAX_TEXT_BYTES = 2**20
"""Larger texts beside images are rejected unread."""


@dataclass(frozen=True)
class FoundImage:
    """An image of the user's: source, file content, and the prompt ("" if none) and detail mask (or None) beside it.

    If `problem` says why the image cannot be used, the other fields but `source` are empty.
    """

    source: str
    data: bytes = b""
    prompt: Any = ""
    mask: bytes | None = None
    problem: str = ""


def find_images(url: str) -> Iterator[FoundImage]:
    """The images of a folder (with all its sub-folders and the tars in them), or of one tar, sorted by name.

    The prompt of `a.png` is in the text file `a.txt`; in a tar, it is in the member `.txt`, or in `prompt`, `caption`
    or `text` of the member `.json`. The detail mask is `a.detail_mask.png`. Hidden files are left out. Raises PlanError
    if there are no images.
    """
    place = open_folder(url) if not url.endswith(".tar") else None
    if place is None:
        yield from _images_in_tar(url)
        return
    with explained(url):
        sizes = place.fs.find(place.path, detail=True) if place.exists("") else None
    if sizes is None:
        raise PlanError(f"{url}: no such folder; give a folder of images, or WebDataset .tar files")
    sizes = {str(path)[len(place.path) + 1 :]: int(facts.get("size") or 0) for path, facts in sizes.items()}
    names = sorted(sizes)
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    texts = {name for name in visible if name.lower().endswith(".txt")}
    masks = {mask for name in visible if name.lower().endswith(SUFFIXES) and (mask := mask_beside(name)) in sizes}
    found = False
    for name in visible:
        if name in masks:
            continue
        lower = name.lower()
        if lower.endswith(SUFFIXES):
            found = True
            if lower.endswith(f".{MASK_EXTENSION}"):
                yield FoundImage(place.url_of(name), problem="a detail mask without its image")
                continue
            source, sidecar, mask = place.url_of(name), name.rsplit(".", 1)[0] + ".txt", mask_beside(name)
            problem = unfit(name, sizes[name], MAX_FILE_BYTES)
            if not problem and sidecar in texts:
                problem = unfit(sidecar, sizes[sidecar], MAX_TEXT_BYTES) or leads_out(place, sidecar)
            if not problem and mask in masks:
                problem = unfit(mask, sizes[mask], MAX_FILE_BYTES) or leads_out(place, mask)
            if problem:
                yield FoundImage(source, problem=problem)
                continue
            prompt = _text(place.read(sidecar)) if sidecar in texts else ""
            yield FoundImage(source, place.read(name), prompt, place.read(mask) if mask in masks else None)
        elif lower.endswith(".tar"):
            found = True
            yield from _images_in_tar(place.url_of(name))
    if not found:
        raise PlanError(f"{url}: no images ({', '.join(SUFFIXES)}) or .tar files in it")


def mask_beside(image: str) -> str:
    """The name (or source) of the detail mask that belongs to an image's name (or source)."""
    return f"{image.rsplit('.', 1)[0]}.{MASK_EXTENSION}"


def read_image(source: str) -> bytes:
    """The content of the image file at a plan's `source`. Raises SampleError if it is gone or cannot be read."""
    tar, marker, member = source.partition(".tar#")
    try:
        if not marker:
            with fsspec.open(source, "rb") as file:
                return file.read()
        place = _tar_index(f"{tar}.tar")[member]
        if place.problem:
            raise SampleError(f"{source}: {place.problem}")
        with fsspec.open(f"{tar}.tar", "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)
    except (OSError, KeyError, PlanError) as error:
        raise SampleError(f"{source}: the image is gone or cannot be read ({error})") from error


def unfit(name: str, size: int, limit: int) -> str:
    """Why a file cannot be used, judged by its name and its size in bytes; "" if it can be used."""
    if printable(name) != name:
        return "its name holds control characters or is not UTF-8"
    if size > limit:
        return f"{name.rsplit('/', 1)[-1]} has {size:,} bytes, more than {limit:,}"
    return ""


def leads_out(place: Folder, name: str) -> str:
    """Why a local file may not be read: it is a link that leads out of the folder. "" if it may be read."""
    if not place.local or Path(place.full(name)).resolve().is_relative_to(Path(place.path or "/").resolve()):
        return ""
    return f"{name.rsplit('/', 1)[-1]} is a link that leads out of the folder; put the file itself there"


@dataclass(frozen=True)
class _Place:
    """The place of a member of a tar, in bytes, or why the member cannot be used."""

    offset: int
    size: int
    problem: str = ""


def _place_of(info: tarfile.TarInfo) -> _Place | None:
    """The place of a member. None for a member that is neither a file nor named like an image."""
    lower = info.name.lower()
    problem = unfit(info.name, info.size, MAX_FILE_BYTES if lower.endswith(SUFFIXES) else MAX_TEXT_BYTES)
    if not info.isreg() or info.issparse():
        if not lower.endswith(SUFFIXES):
            return None
        problem = problem or "a link, a device or a sparse file in the tar; put the image itself there"
    return _Place(info.offset_data, info.size, problem)


@functools.lru_cache(maxsize=4)
def _tar_index(url: str) -> dict[str, _Place]:
    """Member name -> place in a tar. Reads only headers. Of members with one name, the first counts. Raises
    PlanError."""
    try:
        with explained(url), fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found: dict[str, _Place] = {}
            for info in members(tar):
                if (place := _place_of(info)) is not None:
                    found.setdefault(info.name, place)
            return found
    except FileNotFoundError:
        raise PlanError(f"{url}: no such file; give a folder of images, or WebDataset .tar files") from None
    except BAD_TAR as error:
        raise PlanError(f"{url}: not a readable tar ({error}); copy it again or leave it out") from error


def _images_in_tar(url: str) -> Iterator[FoundImage]:
    _tar_index.cache_clear()  # the file may have changed since it was last planned
    index = _tar_index(url)
    samples: dict[str, dict[str, str]] = {}  # key -> extension -> member
    for name in sorted(index):
        folder, slash, base = name.rpartition("/")
        if base.startswith("."):
            continue
        stem, _, extension = base.partition(".")
        samples.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = name
    found = False
    with explained(url), fsspec.open(url, "rb") as file:

        def content(name: str) -> bytes:
            file.seek(index[name].offset)
            return file.read(index[name].size)

        for files in samples.values():
            for name in (name for extension, name in files.items() if f".{extension}" in SUFFIXES):
                found = True
                beside = files.get("txt") or files.get("json")
                mask = mask_beside(name)
                problem = index[name].problem or (index[beside].problem if beside else "")
                problem = problem or (index[mask].problem if mask in index else "")
                if problem:
                    yield FoundImage(f"{url}#{name}", problem=problem)
                    continue
                prompt: Any = ""
                if "txt" in files:
                    prompt = _text(content(files["txt"]))
                elif "json" in files:
                    prompt = _prompt_of_json(content(files["json"]))
                yield FoundImage(f"{url}#{name}", content(name), prompt, content(mask) if mask in index else None)
    if not found:
        raise PlanError(f"{url}: no images ({', '.join(SUFFIXES)}) in it")


def _text(data: bytes) -> str | None:
    """The text of a sidecar file; None if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _prompt_of_json(data: bytes) -> Any:
    """The prompt in a sample's JSON; "" if there is no prompt, None if it is not a JSON object."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return next((values[name] for name in ("prompt", "caption", "text") if name in values), "")
