"""Finds and reads the user's own images, in a folder or in WebDataset tars.

All content from outside is untrusted:
- Nothing is extracted to disk, and names are never used as paths. Links, devices and sparse members of tars are
  rejected. At most `MAX_FILE_BYTES` of a file are read.
- Text beside an image is not read through a link that leads out of the folder, because its content would be published.
  A link to a folder is not followed. An image or a tar may be a link.

Every image is accounted for: `find_images` gives it, or gives the reason why it cannot be used. An image is what has
the name of one. An image under any other name is not noticed. Hidden things (`.x`, also as a folder, and `__MACOSX`)
are no input.

A source is a path or URL of an image file, or `{tar}#{member}` for an image inside a WebDataset tar
(`listings.spell_source`).
"""

from __future__ import annotations

import functools
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from resmaster_stages.errors import PlanError, SampleError
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.filesystem import Folder, open_file, open_folder, refuse_credentials
from resmaster_stages.storage.generation import Generation, read_generation
from resmaster_stages.storage.images import FORMATS, KNOWN_UNREAD, SUFFIXES
from resmaster_stages.storage.listings import (
    Entry,
    FolderListing,
    TarListing,
    list_folder,
    opened_tar,
    parse_source,
    read_whole,
    spell_source,
)

MASK_EXTENSION = "detail_mask.png"
"""Extension of the detail mask beside an image, in a folder or a tar."""
_MASK_EXTENSIONS = (MASK_EXTENSION, "detail_mask.PNG", MASK_EXTENSION.upper())
MAX_FILE_BYTES = 256 * 2**20
"""Larger image files are rejected unread. At 3 bytes per pixel, this is Pillow's limit of pixels, uncompressed."""
MAX_TEXT_BYTES = 2**20
"""Larger texts beside images are rejected unread."""
TEXT_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of the texts beside an image, in the order in which they are asked for a prompt."""
_PROMPT_KEYS = ("prompt", "caption", "text")
"""Where a prompt is in the JSON beside an image, first choice first."""
ARCHIVES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4"),
    *(".zip", ".7z", ".rar"),
)
"""Suffixes of archives, which are not read."""
UNPACK = "is an archive, which is not read; unpack it, or make a plain .tar of it"
SHOWN_TEXTS = 3


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
    generation: Generation | None = None
    """What the file itself says of its prompt. None if there is a text beside it, which counts even if it is blank."""


@dataclass
class LoneTexts:
    """Texts that belong to no image: how many there are, and the names of the first ones."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, names: list[str]) -> None:
        """Count texts, given by their names in a folder or a tar."""
        self.count += len(names)
        self.first += names[: SHOWN_TEXTS - len(self.first)]

    def __str__(self) -> str:
        if not self.count:
            return ""
        shown = ", ".join(map(one_line, self.first)) + (", ..." if self.count > len(self.first) else "")
        return f"{self.count} text{'s belong' if self.count > 1 else ' belongs'} to no image: {shown}"


def find_images(url: str, lone: LoneTexts | None = None) -> Iterator[FoundImage]:
    """The images of a folder (with all its sub-folders and the tars in them), or of one tar, sorted by name.

    The prompt of `a.png` is in the first of these texts that holds one: `a.png.txt`, `a.txt`, then the same with
    `.caption`, then with `.json` (there it is the value of `prompt`, `caption` or `text`). A text without words, null
    and NaN hold none. In a tar, where WebDataset takes `s0` for the key of `s0.input.jpg`, such an image without a text
    of its name has the text of its key (`s0.txt`, `s0.outputs.txt`), unless several images share the key. An image
    without any text may say its prompt itself (`FoundImage.generation`). The detail mask of `a.png` is
    `a.detail_mask.png` (`masks_beside`). Texts that belong to no image are counted in `lone`.

    An image, archive or link to a folder that cannot be used costs only itself, and so does a tar in a folder. Raises
    PlanError if there is nothing else.
    """
    lone = LoneTexts() if lone is None else lone
    place, tar = _place_at(url)
    found, bad_tar = False, ""
    for image in _images_of_tar(place, tar, lone) if tar else _images_of_folder(place, url, lone):
        if image.problem and image.source.lower().endswith(".tar"):
            bad_tar = bad_tar or f"{image.source}: {image.problem}"
        else:
            found = True
        yield image
    if not found:
        raise PlanError(bad_tar or f"{url}: no images ({', '.join(SUFFIXES)}) or .tar files in it")


def masks_beside(image: str) -> tuple[str, ...]:
    """The names that the detail mask of an image may have, first choice first: as the names of texts, its suffix may be
    in upper case, and its accents may be spelled in another way than the image's."""
    folder, slash, base = image.rpartition("/")
    stem = base.rsplit(".", 1)[0]
    stems = dict.fromkeys((stem, unicodedata.normalize("NFC", stem), unicodedata.normalize("NFD", stem)))
    return tuple(f"{folder}{slash}{each}.{extension}" for each in stems for extension in _MASK_EXTENSIONS)


def read_image(source: str) -> bytes:
    """The content of the image file at a plan's `source`. Raises SampleError if it is gone or cannot be read. An error
    of an object store is raised as it is."""
    url, member = parse_source(source)
    place, name = open_file(url)
    try:
        if member is None:
            return read_whole(place, name, MAX_FILE_BYTES)
        entry = _tar_index(url)[member]
        if problem := unfit(member, entry.bytes, MAX_FILE_BYTES) or entry.problem:
            raise SampleError(problem)
        return place.read_part(name, entry.offset, entry.bytes)
    except (SampleError, KeyError) as error:
        cause = error.__cause__ or error
        raise SampleError(f"{source}: the image is gone or cannot be read ({error})") from cause


def unfit(name: str, size: int, limit: int) -> str:
    """Why a file cannot be used, judged by its name and its size in bytes; "" if it can be used."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "its name holds control characters or is not UTF-8"
    if size > limit:
        return f"{name.rsplit('/', 1)[-1]} has {size:,} bytes, more than {limit:,}"
    return ""


@functools.lru_cache(maxsize=4)
def _tar_index(url: str) -> dict[str, Entry]:
    """Member name -> entry of a tar. Raises SampleError if the tar cannot be read."""
    with opened_tar(*open_file(url)) as listing:
        return listing.entries


def _place_at(url: str) -> tuple[Folder, str]:
    """The folder at `url` and "", or the folder of the tar at `url` and the tar's name. Raises PlanError for other
    files."""
    lower = url.lower()
    may_be_file = lower.endswith((".tar", *ARCHIVES, *SUFFIXES, *KNOWN_UNREAD))
    if not may_be_file and not os.path.isfile(os.path.expanduser(url)):
        return open_folder(url), ""
    refuse_credentials(url)
    place, name = open_file(url)
    if place.local and os.path.isdir(place.full(name)):
        return open_folder(url), ""
    if lower.endswith(".tar"):
        return place, name
    if place.local and not os.path.lexists(place.full(name)):
        raise PlanError(f"{url}: no such file; give a folder of images, or WebDataset .tar files")
    if lower.endswith(ARCHIVES):
        raise PlanError(f"{url}: {UNPACK}")
    if lower.endswith((*SUFFIXES, *KNOWN_UNREAD)):
        raise PlanError(f"{url}: is one image; give its folder, or enlarge it alone with `resmaster upscale`")
    raise PlanError(f"{url}: is a file; give a folder of images, or WebDataset .tar files")


def _images_of_folder(place: Folder, url: str, lone: LoneTexts) -> Iterator[FoundImage]:
    listing = list_folder(place)
    if listing is None:
        raise PlanError(f"{url}: no such folder; give a folder of images, or WebDataset .tar files")
    return _images_of(listing, lone)


def _images_of_tar(place: Folder, name: str, lone: LoneTexts) -> Iterator[FoundImage]:
    """The images of a tar. If the tar cannot be used, one FoundImage says why."""
    _tar_index.cache_clear()  # the file may have changed since it was last planned
    empty = True
    try:
        with opened_tar(place, name) as listing:
            for image in _images_of(listing, lone):
                empty = False
                yield image
    except SampleError as error:
        yield FoundImage(spell_source(place.url_of(name)), problem=str(error))
        return
    if empty:
        yield FoundImage(spell_source(place.url_of(name)), problem=f"no images ({', '.join(SUFFIXES)}) in it")


def _images_of(listing: FolderListing | TarListing, lone: LoneTexts) -> Iterator[FoundImage]:
    beside = _Beside(listing)
    again = [f"{name} (second of the name)" for name in listing.repeated if name.lower().endswith(TEXT_SUFFIXES)]
    lone.add([*beside.lone, *again])
    for name, entry in listing.entries.items():
        usable = not entry.problem and not unfit(name, 0, 0)
        if usable and name.lower().endswith(".tar") and isinstance(listing, FolderListing):
            yield from _images_of_tar(listing.place, name, lone)
        elif problem := _why_no_image(name, entry):
            yield FoundImage(listing.source(name), problem=problem)
        elif _is_image(name) and name not in beside.masks:
            lost = name.lower().endswith(f".{MASK_EXTENSION}")
            problem = f"a detail mask without its image; the mask of a.png is called a.{MASK_EXTENSION}"
            yield FoundImage(listing.source(name), problem=problem) if lost else _image(listing, name, beside)
    for name in listing.repeated:
        if _is_image(name) or name.lower().endswith((".tar", *ARCHIVES, *KNOWN_UNREAD)):
            problem = "the same name twice in the tar, where WebDataset readers stop; give it another name"
            yield FoundImage(listing.source(name), problem=problem)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _why_no_image(name: str, entry: Entry) -> str:
    """Why an entry with the name of an image, of images packed together, or of a folder gives no image itself. "" for
    an image, and for what is none by its name."""
    lower = name.lower()
    if lower.endswith("/"):
        named = lower[:-1].endswith((".tar", *ARCHIVES, *SUFFIXES, *KNOWN_UNREAD))
        return entry.problem or ("is a folder; what lies in it is taken by itself" if named else "")
    if lower.endswith(ARCHIVES):
        return entry.problem or UNPACK
    if lower.endswith(".tar"):
        nested = "is a tar inside a tar, which is not read; put it beside the outer tar"
        return entry.problem or unfit(name, 0, 0) or nested
    if lower.endswith(KNOWN_UNREAD):
        suffix = next(suffix for suffix in KNOWN_UNREAD if lower.endswith(suffix))
        return entry.problem or f"{suffix} is not read; convert the image to one of {', '.join(FORMATS)}"
    return ""


class _Beside:
    """Which texts and detail masks of a folder or a tar belong to which images."""

    def __init__(self, listing: FolderListing | TarListing) -> None:
        self._names = listing.entries
        texts = [name for name in self._names if name.lower().endswith(TEXT_SUFFIXES)]
        self._other_spellings = {folded: name for name in texts if (folded := _folded(name)) != name}
        self.mask_of: dict[str, str] = {}
        """Image -> its detail mask."""
        lone = set(texts)
        for name in self._images():
            lone.difference_update(self._named_like(name))
            if mask := next((mask for mask in masks_beside(name) if mask in self._names), None):
                self.mask_of[name] = mask
        self.masks = set(self.mask_of.values())
        """Detail masks that belong to an image."""
        self._texts_of_key: dict[str, list[str]] = {}
        self._images_of_key: dict[str, int] = {}
        if isinstance(listing, TarListing):
            self._share(lone)
        self.lone = [name for name in texts if name in lone]
        """Texts that belong to no image."""

    def texts_of(self, image: str) -> list[str]:
        """The texts of an image, in the order in which they are asked. Raises SampleError if that cannot be told."""
        key = _key(image)
        if (named := self._named_like(image)) or not _has_fields(image) or key not in self._texts_of_key:
            return named
        texts = sorted(self._texts_of_key[key], key=_rank)
        shown = ", ".join(name.rsplit("/", 1)[-1] for name in texts[:SHOWN_TEXTS])
        rule = f"WebDataset takes {key.rsplit('/', 1)[-1]!r} for its key"
        own = f"call its text {image.rsplit('/', 1)[-1].rsplit('.', 1)[0]}{TEXT_SUFFIXES[_rank(texts[0])]}"
        if (images := self._images_of_key[key]) > 1:
            raise SampleError(f"{rule}, which {images} images share, so {shown} may belong to another; {own}")
        if len(set(map(_rank, texts))) < len(texts):
            raise SampleError(f"{rule}, which several texts have ({shown}); {own}")
        return texts

    def _images(self) -> Iterator[str]:
        """Names of images, also of those that are not read."""
        return (name for name in self._names if name.lower().endswith((*SUFFIXES, *KNOWN_UNREAD)))

    def _named_like(self, image: str) -> list[str]:
        """The texts with the name of an image, whatever the case of their suffix and the spelling of their accents."""
        bases = (image, image.rsplit(".", 1)[0])
        found = (self._spelled(f"{base}{suffix}") for suffix in TEXT_SUFFIXES for base in bases)
        return [name for name in found if name]

    def _spelled(self, text: str) -> str | None:
        if text in self._names:
            return text
        folded = text if text.isascii() else _folded(text)
        return folded if folded in self._names else self._other_spellings.get(folded)

    def _share(self, lone: set[str]) -> None:
        """Give texts without an image of their name to the images of their key, and remove these texts from `lone`."""
        for name in sorted(lone):
            self._texts_of_key.setdefault(_key(name), []).append(name)
        wanting = set()
        for name in self._images():
            if name in self.masks or (key := _key(name)) not in self._texts_of_key:
                continue
            self._images_of_key[key] = self._images_of_key.get(key, 0) + 1
            if _has_fields(name) and not self._named_like(name):
                wanting.add(key)
        for key in wanting:
            lone.difference_update(self._texts_of_key[key])


def _key(name: str) -> str:
    """The WebDataset key of a member: its name up to the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _has_fields(name: str) -> bool:
    """Whether WebDataset takes more than the suffix of a member for its field."""
    return "." in name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _rank(text: str) -> int:
    """The place of a text's suffix in `TEXT_SUFFIXES`."""
    return next(rank for rank, suffix in enumerate(TEXT_SUFFIXES) if text.lower().endswith(suffix))


def _folded(text: str) -> str:
    """The name of a text with its suffix in lower case, and accents composed (systems spell them differently)."""
    stem, dot, suffix = text.rpartition(".")
    return unicodedata.normalize("NFC", f"{stem}{dot}{suffix.lower()}")


def _image(listing: FolderListing | TarListing, name: str, beside: _Beside) -> FoundImage:
    """An image with what lies beside it, or the reason why it cannot be used."""
    source, mask = listing.source(name), beside.mask_of.get(name)
    try:
        texts = beside.texts_of(name)
        prompt = _prompt_in(listing, texts)
        mask_data = _content(listing, mask, MAX_FILE_BYTES, beside=True) if mask else None
        data = _content(listing, name, MAX_FILE_BYTES)
        return FoundImage(source, data, prompt, mask_data, generation=None if texts else read_generation(data))
    except SampleError as error:
        return FoundImage(source, problem=str(error))


def _content(listing: FolderListing | TarListing, name: str, limit: int, beside: bool = False) -> bytes:
    """The content of an image, or of a file beside an image. Raises SampleError, which then names the file."""
    entry, base = listing.entries[name], name.rsplit("/", 1)[-1]
    prefix = f"{base} " if beside else ""
    problem = unfit(name, entry.bytes, limit) or (entry.problem and f"{prefix}{entry.problem}")
    if problem := problem or (listing.leads_out(name) if beside else ""):
        raise SampleError(problem)
    try:
        return listing.read(name, limit)
    except SampleError as error:
        raise SampleError(f"{prefix}{error}") from error


def _prompt_in(listing: FolderListing | TarListing, texts: list[str]) -> Any:
    """The first prompt in the texts of an image. If there is none: a value that is no text, or "". Raises
    SampleError."""
    no_text: Any = ""
    for name in texts:
        data, base = _content(listing, name, MAX_TEXT_BYTES, beside=True), name.rsplit("/", 1)[-1]
        found = _prompt_of_json(data, base) if name.lower().endswith(".json") else _text(data, base)
        if isinstance(found, str) and found:
            return found
        no_text = no_text if isinstance(found, str) else found
    return no_text


def _text(data: bytes, name: str) -> str:
    """The content of a text; "" if it is blank. Raises SampleError if it is not UTF-8."""
    try:
        if b"\0" not in data:
            text = data.decode("utf-8-sig")
            return text if text.strip() else ""
    except UnicodeDecodeError:
        pass
    looks = "UTF-16" if b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252"
    raise SampleError(f"{name}: not UTF-8 text; save the file as UTF-8 (it looks like {looks})")


def _prompt_of_json(data: bytes, name: str) -> Any:
    """The prompt in the JSON of an image: the first text in `prompt`, `caption` and `text`. If there is none: a value
    that is no text, or "". Raises SampleError if it is not JSON, or has one of these twice."""
    try:
        # a dictionary would hide names that are there twice, and an integer may have too many digits for Python
        values = json.loads(data, object_pairs_hook=tuple, parse_int=float) if data.strip() else None
    except (ValueError, RecursionError):
        raise SampleError(f"{name}: not valid JSON; mend it, or write the prompt into a .txt file") from None
    if not isinstance(values, tuple):
        return ""  # such as a list of marked regions
    names = [each for each, _ in values]
    if twice := [key for key in _PROMPT_KEYS if names.count(key) > 1]:
        raise SampleError(f"{name}: has {twice[0]!r} {names.count(twice[0])} times; keep one")
    found = [value for key in _PROMPT_KEYS for each, value in values if each == key and not is_absent(value)]
    texts = [value for value in found if isinstance(value, str)]
    return next(iter([*texts, *found]), "")


def is_absent(value: Any) -> bool:
    """Whether a value of a table or of JSON stands for nothing: null, NaN, or a text without words."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
