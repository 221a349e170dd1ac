"""Reads the user's detail masks: image files named in a column of a prompts file, or beside the user's own images.

All content is untrusted, as that of images is:
- A name may lead only to files below the prompts file's folder: no other path, no URL, no link that leads out.
- A mask is decoded as images are. The published mask is encoded anew, never a copy of the user's file.

A source is a path or URL of an image file, `{tar}#{member}`, or `{Parquet file}#{row}` (from 1) for a mask in a table.
"""

from __future__ import annotations

import errno
import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resmaster_stages.errors import SampleError
from resmaster_stages.storage.filesystem import Folder, open_file, open_folder
from resmaster_stages.storage.images import SUFFIXES, image_size
from resmaster_stages.storage.listings import leads_out, parse_source, spell_source
from resmaster_stages.storage.sources import MAX_FILE_BYTES, masks_beside, read_image, unfit
from resmaster_stages.storage.store_errors import explained

COLUMN = "detail_mask"
"""The column of a prompts file that names a mask, or (in Parquet) holds the content of its file."""
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
BATCH_ROWS = 64
"""Rows that are decoded at a time from a Parquet file with masks."""


def mask_of_row(prompts: str, value: Any, row: int) -> tuple[str, bytes]:
    """(source, file content) of the mask given by `value` in row `row` (from 1) of the prompts file `prompts`.

    Raises SampleError with a short reason if there is no usable mask.
    """
    folder, slash, base = prompts.rpartition("/")
    place = open_folder(folder + slash or ".")
    if isinstance(value, bytes):
        if len(value) > MAX_FILE_BYTES:
            raise SampleError(f"has {len(value):,} bytes, more than {MAX_FILE_BYTES:,}")
        source, data = f"{place.url_of(base)}#{row}", value
    else:
        source, data = _named(place, value)
    check_mask(data)
    return source, data


def _named(place: Folder, name: Any) -> tuple[str, bytes]:
    """(source, file content) of the file `name` below `place`. Raises SampleError."""
    if not isinstance(name, str):
        raise SampleError("not the name of a file")
    if "://" in name or name.startswith("/") or ".." in name.split("/"):
        raise SampleError("leads out of the prompts file's folder; put the mask there and name it relative to it")
    if not name.lower().endswith(SUFFIXES):
        raise SampleError(f"unknown kind of image; known: {', '.join(SUFFIXES)}")
    with explained(place.url_of(name)):
        try:
            problem = unfit(name, 0, MAX_FILE_BYTES) or leads_out(place, name)
            if not problem and place.local and not Path(place.full(name)).is_file():
                raise FileNotFoundError(name)  # or a folder, or a pipe, which would keep its reader waiting
            problem = problem or unfit(name, int(place.fs.size(place.full(name)) or 0), MAX_FILE_BYTES)
            if problem:
                raise SampleError(problem)
            return spell_source(place.url_of(name)), place.read(name)
        except OSError as error:
            if place.local and isinstance(error, PermissionError):
                raise SampleError("permission denied; check who may read the file") from None
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP) and not isinstance(error, NO_FILE):
                raise
            raise SampleError(f"no such file; names are relative to the prompts file's folder, {place.url}") from None


def check_mask(data: bytes) -> None:
    """Raise SampleError if an image file cannot be a mask. Reads only its header."""
    image_size(data, "the mask")


def read_mask(source: str) -> bytes:
    """The content of the mask file that `mask_of_row` found at `source`. Raises SampleError if it cannot be read."""
    url, _, row = source.rpartition("#")
    if not row.isdecimal():
        return read_image(source)
    try:
        return _in_table(url, int(row))
    except (OSError, pa.ArrowException, LookupError) as error:
        raise SampleError(f"{source}: the mask is gone or cannot be read ({error})") from error


def read_mask_beside(source: str) -> bytes:
    """The content of the mask file beside the user's image at `source`. Raises SampleError if it cannot be read."""
    url, member = parse_source(source)
    names = masks_beside(url if member is None else member)
    masks = [spell_source(name) if member is None else spell_source(url, name) for name in names]
    for mask in masks[:-1]:
        try:
            return read_image(mask)
        except SampleError as error:
            if not isinstance(error.__cause__, (FileNotFoundError, KeyError)):
                raise
    return read_image(masks[-1])


def _in_table(url: str, row: int) -> bytes:
    place, name = open_file(url)
    with place.open(name) as file:
        metadata = pq.read_metadata(file)
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < first + rows:
            value = _masks(url, group)[row - first].as_py()
            return value if isinstance(value, bytes) else b""
        first += rows
    raise IndexError(f"it has {first - 1} rows")


@functools.lru_cache(maxsize=1)
def _masks(url: str, group: int) -> pa.ChunkedArray:
    """The masks of a row group, dictionary-encoded, so that equal masks are held once."""
    place, name = open_file(url)
    with place.open(name) as file:
        return pq.ParquetFile(file, read_dictionary=[COLUMN]).read_row_group(group, columns=[COLUMN])[COLUMN]


def forget_tables() -> None:
    """Clear the cache of tables, because they may have changed since they were last planned."""
    _masks.cache_clear()
