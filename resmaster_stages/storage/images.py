"""Images from outside: decoding them safely, and the user's own images in a folder or in WebDataset tars.

Knows nothing about plans. All content is untrusted: nothing is extracted to disk, names are only names.

A source is a path or URL of an image file, or `{tar}#{member}` for one inside a WebDataset tar.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from PIL import Image, ImageOps

from resmaster_stages.errors import PlanError, SampleError
from resmaster_stages.storage.filesystem import explained, open_root

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap the sides


@dataclass(frozen=True)
class FoundImage:
    """An image of the user's: where it is, its file content, and the prompt beside it ("" if there is none)."""

    source: str
    data: bytes
    prompt: Any


def decode_image(data: bytes, name: str) -> Image.Image:
    """An image file as RGB, upright (EXIF), fully decoded; transparency becomes white. Raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
            opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(f"{name}: the image has too many pixels ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise SampleError(f"{name}: not a readable image ({error})") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) in px of an image file as `decode_image` will give it, from its header. Raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        swapped = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(f"{name}: the image has too many pixels ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise SampleError(f"{name}: not a readable image ({error})") from error
    return (image.width, image.height) if swapped else (image.height, image.width)


def find_images(url: str) -> Iterator[FoundImage]:
    """The images of a folder (with all its sub-folders), of the tars in it, or of one tar, sorted by name.

    Prompts: beside `a.png` the text file `a.txt`; in a tar the members `.txt`, or `prompt`, `caption` or `text` of the
    `.json`. Hidden files are left out. Raises PlanError if there is nothing.
    """
    place = open_root(url) if not url.endswith(".tar") else None
    if place is None:
        yield from _images_in_tar(url)
        return
    with explained(url):
        paths = sorted(place.fs.find(place.path)) if place.exists("") else None
    if paths is None:
        raise PlanError(f"{url}: no such folder; give a folder of images, or WebDataset .tar files")
    names = [str(path)[len(place.path) + 1 :] for path in paths]
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    texts = {name for name in visible if name.lower().endswith(".txt")}
    found = False
    for name in visible:
        lower = name.lower()
        if lower.endswith(SUFFIXES):
            found = True
            sidecar = name.rsplit(".", 1)[0] + ".txt"
            prompt = _text(place.read(sidecar)) if sidecar in texts else ""
            yield FoundImage(place.url_of(name), place.read(name), prompt)
        elif lower.endswith(".tar"):
            found = True
            yield from _images_in_tar(place.url_of(name))
    if not found:
        raise PlanError(f"{url}: no images ({', '.join(SUFFIXES)}) or .tar files in it")


def read_image(source: str) -> bytes:
    """The image file that a plan's `source` names. Raises SampleError if it is gone or cannot be read."""
    tar, marker, member = source.partition(".tar#")
    try:
        if not marker:
            data: bytes = _read(source)
            return data
        offset, size = _tar_index(f"{tar}.tar")[member]
        with fsspec.open(f"{tar}.tar", "rb") as file:
            file.seek(offset)
            data = file.read(size)
            return data
    except (OSError, KeyError, PlanError) as error:
        raise SampleError(f"{source}: the image is gone or cannot be read ({error})") from error


def _read(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        data: bytes = file.read()
        return data


@functools.lru_cache(maxsize=4)
def _tar_index(url: str) -> dict[str, tuple[int, int]]:
    """Member name -> (first byte, bytes) of a tar, reading only its headers. Raises PlanError."""
    try:
        with explained(url), fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return {info.name: (info.offset_data, info.size) for info in reversed(list(tar)) if info.isreg()}
    except FileNotFoundError:
        raise PlanError(f"{url}: no such file; give a folder of images, or WebDataset .tar files") from None
    except (tarfile.TarError, EOFError) as error:
        raise PlanError(f"{url}: not a readable tar ({error}); copy it again or leave it out") from error


def _images_in_tar(url: str) -> Iterator[FoundImage]:
    _tar_index.cache_clear()  # the file may have changed since it was last planned
    index = _tar_index(url)
    samples: dict[str, dict[str, str]] = {}
    for name in sorted(index):
        folder, slash, base = name.rpartition("/")
        if base.startswith("."):
            continue
        stem, _, extension = base.partition(".")
        samples.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = name
    found = False
    with explained(url), fsspec.open(url, "rb") as file:

        def content(name: str) -> bytes:
            offset, size = index[name]
            file.seek(offset)
            data: bytes = file.read(size)
            return data

        for members in samples.values():
            images = [name for extension, name in members.items() if f".{extension}" in SUFFIXES]
            for name in images:
                found = True
                prompt: Any = ""
                if "txt" in members:
                    prompt = _text(content(members["txt"]))
                elif "json" in members:
                    prompt = _prompt_of_json(content(members["json"]))
                yield FoundImage(f"{url}#{name}", content(name), prompt)
    if not found:
        raise PlanError(f"{url}: no images ({', '.join(SUFFIXES)}) in it")


def _text(data: bytes) -> str | None:
    """Text of a sidecar; None if it is not text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _prompt_of_json(data: bytes) -> Any:
    """The prompt in a sample's JSON: "" if it names none, None if it is not JSON."""
    try:
        values = json.loads(data)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    return next((values[name] for name in ("prompt", "caption", "text") if name in values), "")
