"""The image files of `resmaster upscale`: which are read, under which names the results are written, and how.

Invariants:
- No input is overwritten, by whatever name, and two results never get the same name.
- A result has its final name only when it is whole.
"""

from __future__ import annotations

import glob
import io
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.errors import ConfigError, UserError, did_you_mean
from resmaster_stages.redaction import LINE_CHARACTERS, printable
from resmaster_stages.storage.deep_png import deep_levels, encode_deep_png
from resmaster_stages.storage.images import KNOWN_UNREAD, LONGEST_PX, SUFFIXES, encoder_options, require_writable
from resmaster_stages.storage.labels import Label, label_options
from resmaster_stages.storage.transparency import with_transparency

OutputFormat = Literal["png", "webp", "jpeg", "avif", "jxl"]

STREAM = "-"
"""Standard input or standard output in the place of a name."""
FORMATS: dict[str, OutputFormat] = {
    **{".png": "png", ".webp": "webp", ".avif": "avif", ".jxl": "jxl"},
    **{".jpg": "jpeg", ".jpeg": "jpeg"},
}
"""Suffix of an output -> its format."""
SUFFIX_OF: dict[OutputFormat, str] = {"png": ".png", "webp": ".webp", "jpeg": ".jpg", "avif": ".avif", "jxl": ".jxl"}
"""Format -> the suffix of a result in a folder."""
QUALITY = 95
"""The quality of formats that have one."""
WITHOUT_ALPHA, WITHOUT_QUALITY, DEEP = ("jpeg",), ("png",), ("png",)
"""Formats that hold no transparency, that have no quality, that hold 16 bits per channel here."""


@dataclass(frozen=True)
class Encoding:
    """How results are written, as the options say."""

    format: OutputFormat | None
    """None: as the name says."""
    quality: int | None
    """None: `QUALITY` where the format has one."""
    bits: int
    """Bits per channel, 8 or 16."""
    alpha: bool
    """Whether the input's transparency is kept."""

    def check(self, name: OutputFormat) -> None:
        """Raise UserError if a file of this format cannot be written so."""
        if name in ("avif", "jxl"):
            try:
                require_writable(name)
            except ConfigError as error:
                raise UserError(str(error)) from None
        if self.quality is not None and name in WITHOUT_QUALITY:
            raise UserError(f"--quality {self.quality}: {name} has none, because it loses nothing; leave --quality out")
        if self.alpha and name in WITHOUT_ALPHA:
            raise UserError(f"--alpha keep: {name} holds no transparency; write png, webp, avif or jxl")
        if self.bits == 16 and name not in DEEP:
            raise UserError(f"--bit-depth 16: {name} files are written with 8 bits per channel; write png")

    def encode(
        self,
        made: Image.Image | NDArray[np.floating],
        alpha: Image.Image | None,
        name: OutputFormat,
        label: Label | None,
    ) -> bytes:
        """A result as the content of a file. made: an RGB image, or for 16 bits [H, W, 3] from 0 to 1. alpha: the
        input's opacity, if it is to be kept."""
        said = label_options(label, name) if label else {}
        if self.bits == 16:
            deep = np.asarray(made)
            return encode_deep_png(deep_levels(deep if alpha is None else with_transparency(deep, alpha)), **said)
        assert isinstance(made, Image.Image)
        if alpha is not None:
            values = with_transparency(np.asarray(made, dtype=np.float32) / 255, alpha)
            made = Image.fromarray(np.rint(values * 255).astype(np.uint8))
        quality = QUALITY if self.quality is None else self.quality
        options = {"quality": quality} if name == "jpeg" else encoder_options(name, quality)
        buffer = io.BytesIO()
        made.save(buffer, name.upper(), **options, **said)
        return buffer.getvalue()


@dataclass(frozen=True)
class Job:
    """One image to upscale."""

    source: Path | None
    """None: standard input."""
    target: Path | None
    """None: standard output."""
    format: OutputFormat

    @property
    def name(self) -> str:
        """The input's name in messages."""
        return "standard input" if self.source is None else printable(str(self.source))


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    inputs: tuple[str, ...]
    output: str
    suffix: str
    """What is put behind the names of results in a folder, before the suffix of the format."""
    encoding: Encoding
    force: bool
    others: tuple[Path, ...]
    """Further files that are read, and so are never overwritten."""


def jobs_of(wanted: Wanted) -> tuple[list[Job], int]:
    """The images that are to be upscaled, and how many results are there already and are left as they are.

    Raises UserError, before anything is computed, for what cannot be read or written, or would overwrite something.
    """
    if wanted.inputs.count(STREAM) > 1:
        raise UserError("- is standard input, which can be read once; give - once")
    if is_one(wanted.inputs, wanted.output):
        return [_one(wanted)], 0
    if wanted.output == STREAM:
        raise UserError("- as OUTPUT is standard output, which takes one image; give one INPUT, or a folder as OUTPUT")
    if STREAM in wanted.inputs:
        raise UserError("- as INPUT is standard input: its result has no name in a folder; give it alone, and a file")
    return _many(wanted)


def is_one(inputs: Sequence[str], output: str) -> bool:
    """Whether there is one image, with a file or standard output to write it to."""
    if len(inputs) != 1:
        return False
    (only,) = inputs
    named_as_image = Path(output).suffix.lower() in FORMATS  # and so is a file, unless a slash follows
    into_folder = output.endswith("/") or (os.path.isdir(output) and not named_as_image)
    return only == STREAM or not (into_folder or os.path.isdir(only) or _is_pattern(only))


def _one(wanted: Wanted) -> Job:
    encoding = wanted.encoding
    source = None if wanted.inputs[0] == STREAM else Path(wanted.inputs[0])
    if wanted.suffix:
        raise UserError("--suffix is for results in a folder; give a folder as OUTPUT, or leave --suffix out")
    if wanted.output == STREAM:
        if sys.stdout.isatty():
            raise UserError("- as OUTPUT: standard output is a terminal; lead it into a file or another program")
        name = encoding.format or "png"
        encoding.check(name)
        return Job(source, None, name)
    target = Path(wanted.output)
    by_name = FORMATS.get(target.suffix.lower())
    if by_name is None and not (encoding.format and target.suffix):
        meant = did_you_mean(target.suffix, FORMATS)
        more = "" if target.suffix else ", or give a folder that is there"
        raise UserError(
            f"{target}: unknown image format {target.suffix!r}{meant}; use one of {', '.join(FORMATS)}{more}"
        )
    if encoding.format and by_name and encoding.format != by_name:
        raise UserError(f"{target}: its name says {by_name}, and --output-format {encoding.format}; change one of them")
    job = Job(source, target, encoding.format or by_name or "png")
    try:
        encoding.check(job.format)
    except UserError as error:
        raise UserError(f"{target}: {error}") from None
    if not os.path.isdir(target.parent):
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")
    _refuse_inputs([job], wanted)
    if _is_there(target) and not wanted.force:
        raise UserError(f"{target}: is there already; choose another output file, or overwrite it with --force")
    return job


def _many(wanted: Wanted) -> tuple[list[Job], int]:
    folder = Path(wanted.output)
    if folder.suffix.lower() in FORMATS and not os.path.isdir(folder) and not wanted.output.endswith("/"):
        if inner := next(filter(os.path.isdir, wanted.inputs), None):
            raise UserError(f"{inner}: is a folder; give an image file, or a folder as OUTPUT")
        raise UserError(f"{folder}: several images go into a folder; give a folder as OUTPUT")
    _require_folder(folder)
    if "/" in wanted.suffix or "\0" in wanted.suffix:
        raise UserError(f"--suffix {wanted.suffix}: cannot be in a name; leave the slash out")
    jobs: dict[Path, Job] = {}
    for source, relative in _found(wanted, folder):
        name = wanted.encoding.format or FORMATS.get(source.suffix.lower(), "png")
        wanted.encoding.check(name)
        ending = source.suffix if FORMATS.get(source.suffix.lower()) == name else SUFFIX_OF[name]
        job = Job(source, folder / relative.with_name(f"{relative.stem}{wanted.suffix}{ending}"), name)
        assert job.target is not None
        other = jobs.setdefault(job.target, job)
        if other.source != source and not _same(other.source, source):
            raise UserError(
                f"{other.source} and {source}: the results of both would be {job.target}; upscale them into two folders"
            )
    _refuse_inputs(list(jobs.values()), wanted)
    due = [job for target, job in jobs.items() if wanted.force or not _is_there(target)]
    return due, len(jobs) - len(due)


def _is_pattern(text: str) -> bool:
    return glob.has_magic(text) and not os.path.lexists(text)


def _found(wanted: Wanted, output: Path) -> Iterator[tuple[Path, Path]]:
    """The files among the inputs, in folders and by patterns, each with its path below the output's folder."""
    for text in wanted.inputs:
        names = sorted(glob.glob(text, recursive=True)) if _is_pattern(text) else [text]
        if not names:
            raise UserError(f"{text}: no file has a name like this; check the pattern")
        for name in names:
            if not os.path.isdir(name):
                yield Path(name), Path(Path(name).name)
                continue
            found = list(_images_in(Path(name), output, wanted.suffix))
            if not found and not _is_pattern(text):
                raise UserError(f"{name}: no images ({', '.join(SUFFIXES)}) in it; give a folder of images")
            yield from ((path, path.relative_to(name)) for path in found)


def _images_in(folder: Path, output: Path, suffix: str) -> Iterator[Path]:
    """The images of a folder and its sub-folders, without hidden ones and without earlier results."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); give a folder that you may read")

    into_itself = _same(folder, output)
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(
            each
            for each in folders
            if not each.startswith(".") and each != "__MACOSX" and not _same(Path(place, each), output)
        )
        for name in sorted(names):
            earlier = into_itself and suffix and Path(name).stem.endswith(suffix)
            if name.lower().endswith((*SUFFIXES, *KNOWN_UNREAD)) and not name.startswith(".") and not earlier:
                yield Path(place, name)


def _require_folder(folder: Path) -> None:
    """Raise UserError if results cannot be written into `folder`, which need not be there yet."""
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', error)}); give another folder"
        ) from None
    if not os.path.isdir(there):
        raise UserError(f"{folder}: {there} is a file; give a folder as OUTPUT")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} does not allow writing; give another folder")


def _refuse_inputs(jobs: Sequence[Job], wanted: Wanted) -> None:
    """Raise UserError if an output is an input, or something else that no image may replace."""
    read = {file_id for each in (*(job.source for job in jobs), *wanted.others) if (file_id := _file_id(each))}
    for job in jobs:
        target = job.target
        assert target is not None
        if (found := _file_id(target)) and found in read:
            more = ", or add --suffix" if len(jobs) > 1 else ""
            raise UserError(
                f"{target}: is the input itself, which is never overwritten; choose another output file{more}"
            )
        if _is_there(target) and (os.path.exists(target) and not target.is_file()):
            raise UserError(f"{target}: cannot be written; choose another output file")
        if os.path.isdir(target.parent) and not os.access(target.parent, os.W_OK):
            raise UserError(f"{target}: cannot be written; choose another output file")


def _file_id(path: Path | None) -> tuple[int, int] | None:
    """What tells the file apart from others, through links; None if there is none."""
    try:
        found = os.stat(path) if path is not None else None
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if found else None


def _same(one: Path | None, other: Path | None) -> bool:
    return (found := _file_id(one)) is not None and found == _file_id(other)


def _is_there(path: Path) -> bool:
    """Whether something has this name, a link to nothing included. Raises UserError for a name that none can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(path)[:LINE_CHARACTERS]}: cannot be written ({reason}); choose another output file"
        ) from None
    return True


def check_size(job: Job, size: tuple[int, int]) -> None:
    """Raise UserError for an image of `size` px that is too large for the format of the output."""
    limit = LONGEST_PX.get(job.format.upper())
    if limit is not None and max(size) > limit:
        name = job.target or "standard output"
        raise UserError(f"{name}: the format holds at most {limit} px a side, not {max(size)}; write a .png file")


def write(data: bytes, target: Path | None, force: bool) -> None:
    """Write a result under a temporary name first, so that the final name never holds a half-written file.

    Raises UserError. Without `force`, a file that has appeared under the final name meanwhile is kept, and so is the
    result.
    """
    if target is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    part = target.with_name(f"resmaster-{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            file.write(data)
        _rename(part, target, force)
    except FileExistsError:
        raise UserError(f"{target}: has appeared meanwhile, and is kept; the result is in {part}") from None
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); choose another output file"
        ) from None


def _rename(part: Path, path: Path, force: bool) -> None:
    """Rename `part` to `path`. Raises FileExistsError if `path` exists, unless `force` is set.

    The name is taken by an empty file first: a hard link would do both at once, and some disks have none.
    """
    if not force:
        path.touch(exist_ok=False)
    try:
        os.replace(part, path)
    except BaseException:
        if not force:
            path.unlink()
        raise
