"""Which export a folder holds, and which of its shards are done.

    export.json                  what the export holds; written last, gone while the export is being changed
    .resmaster/request.json      what was asked for; written first
    .resmaster/000123.json       a finished shard: its files, and what the format needs of it at the end

Invariants:
- A folder without `.resmaster/request.json` is written to only if it is empty.
- The record of a shard is written after the shard's files. A shard without a record is written again, as a whole.
- Equal requests and equal datasets give equal files: no time or host is in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ConfigDict, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import UserError
from resmaster_stages.keys import digest
from resmaster_stages.storage.filesystem import Folder

EXPORT = "export.json"
PRIVATE = ".resmaster"
REQUEST = f"{PRIVATE}/request.json"
READ_AT_ONCE = 64
"""Records of shards that are read and held together."""
_SHARD = re.compile(rf"{re.escape(PRIVATE)}/(\d{{6}})\.json")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Options:
    """What a user asks for."""

    format: str
    where: str = ""
    """An expression of `SampleTable`; "" for all samples."""
    with_rejected: bool = False
    sizes: tuple[int | None, ...] = ()
    """Sizes of copies; None for the image as it is. Each gets a sub-folder. (): the image as it is, in the folder."""
    limit: int | None = None
    signer: str = ""
    """The sha256 of the certificates with which images are signed; "" if they are not."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Request:
    """The content of `.resmaster/request.json`."""

    dataset: str
    """Digest of what fixes the dataset's samples and their order."""
    name: str
    options: Options


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ExportRecord:
    """The content of `export.json`."""

    name: str
    """Name of the dataset."""
    options: Options
    samples: int
    publication: str
    """Digest of the dataset's published commits."""
    choices: str
    """Digest of what people chose; "" for nothing."""
    notes: tuple[str, ...]
    """What users should know of the export."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ShardRecord:
    """A finished shard of the export."""

    content: str
    """Digest of all that the shard's files are made from. "": the shard is being written, and `files` are those that
    may be there."""
    samples: int
    whole: tuple[int, ...]
    """For each size, the samples that are smaller than asked for."""
    files: tuple[str, ...]
    rows: tuple[tuple[dict[str, Any], ...], ...]
    """For each size, what `Format.write` gave."""


def claim(folder: Folder, dataset: Dataset, options: Options) -> None:
    """Make a folder the place of this export. Raises UserError if it holds something else."""
    request = Request(digest(dataset.config.plan_identity()), dataset.config.name, options)
    try:
        found = parse_record(Request, folder.read(REQUEST))
    except FileNotFoundError:
        if {*folder.names("")} - {PRIVATE} or not all(map(layout.is_temporary, folder.names(PRIVATE))):
            raise UserError(f"{folder.url}: is not empty and holds no export; choose a new or empty folder") from None
        folder.write(REQUEST, record_text(request))
        return
    except ValueError as error:
        raise UserError(
            f"{folder.url_of(REQUEST)}: cannot be read ({error}); delete the export's folder, or choose another one"
        ) from error
    if (found.dataset, found.name) != (request.dataset, request.name):
        raise UserError(f"{folder.url}: holds an export of another dataset, {found.name!r}; choose another folder")
    for each in fields(Options):
        was, wished = getattr(found.options, each.name), getattr(options, each.name)
        if was != wished:
            option = "--as" if each.name == "format" else f"--{each.name.replace('_', '-')}"
            raise UserError(
                f"{folder.url}: holds an export with another {option} ({_spelled(was)}, now {_spelled(wished)}); "
                "choose another folder, or ask for the same"
            )


def _spelled(value: object) -> str:
    """The value of an option, for people."""
    if isinstance(value, bool):
        return "given" if value else "none"
    if isinstance(value, tuple):
        value = ",".join(str(size or "full") for size in value)
    return repr(value) if value else "none"


def read_export(folder: Folder) -> ExportRecord | None:
    """The record of a finished export; None if there is none, or if it cannot be read."""
    try:
        return parse_record(ExportRecord, folder.read(EXPORT))
    except (FileNotFoundError, ValueError):
        return None


def write_export(folder: Folder, record: ExportRecord) -> None:
    """Write or replace the record of a finished export."""
    folder.write(EXPORT, record_text(record))


def shard_name(shard: int) -> str:
    """Name of the record of a finished shard."""
    return f"{PRIVATE}/{shard:06d}.json"


def finished_shards(folder: Folder) -> list[int]:
    """The shards that have a record, in order."""
    return sorted(int(found[1]) for name in folder.names(PRIVATE) if (found := _SHARD.fullmatch(name)))


def read_shards(folder: Folder, shards: Collection[int]) -> Iterator[ShardRecord]:
    """The records of finished shards, in the order of `shards`. Some are held at a time."""
    names = [shard_name(shard) for shard in shards]
    for start in range(0, len(names), READ_AT_ONCE):
        some = names[start : start + READ_AT_ONCE]
        found = folder.read_many(some)
        for name in some:
            record = _parsed(found.get(name, b""))
            if record is None:
                raise UserError(f"{folder.url_of(name)}: is gone or damaged; run the same command again")
            yield record


def read_shard(folder: Folder, shard: int) -> ShardRecord | None:
    """The record of a finished shard; None if there is none, or if it cannot be read."""
    return _parsed(folder.read_many([shard_name(shard)]).get(shard_name(shard), b""))


def _parsed(data: bytes) -> ShardRecord | None:
    try:
        return parse_record(ShardRecord, data)
    except ValueError:
        return None


def write_shard(folder: Folder, shard: int, record: ShardRecord) -> None:
    """Write or replace the record of a finished shard."""
    folder.write(shard_name(shard), record_text(record))


def content_of(rows: list[dict[str, Any]]) -> str:
    """The digest of rows of a table, whose numbers may be infinite."""
    return digest(json.dumps(rows, sort_keys=True))
