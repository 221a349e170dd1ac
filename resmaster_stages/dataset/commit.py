"""The commit protocol: produce locally, validate, upload under attempt-unique names, then ONE conditional create.

Knows nothing about what is inside the objects.

Invariants:
- A commit record is written by exactly one attempt and never changed; it names all its objects with sha256 and size.
- Readers follow commit records; what no record names does not exist for them.
- A loser deletes its own objects only, which no record names; while it is unknown who won, nothing is deleted.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from resmaster_stages.storage.filesystem import Folder

BLOCKS = 256
"""At most so many blocks of an object have a checksum of their own: 2 KiB in its record."""
SMALLEST_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a content without keeping it."""

    sha256: str
    bytes: int
    crc32: tuple[str, ...]
    """Of each block."""


def block_bytes_of(size: int) -> int:
    """The block size of an object of `size` bytes: a power of two."""
    return max(SMALLEST_BLOCK_BYTES, 1 << max(0, -(-size // BLOCKS) - 1).bit_length())


def fingerprint(blocks: Iterable[bytes]) -> Fingerprint:
    """sha256 of a content and CRC-32 of each of its blocks, in one pass."""
    whole, checks, size = hashlib.sha256(), [], 0
    for block in blocks:
        whole.update(block)
        checks.append(f"{zlib.crc32(block):08x}")
        size += len(block)
    return Fingerprint(whole.hexdigest(), size, tuple(checks))


def describe(name: str, path: Path) -> StoredObject:
    """A local file as the object `name`."""
    size = path.stat().st_size
    block_bytes = block_bytes_of(size)
    with path.open("rb") as file:
        found = fingerprint(iter(lambda: file.read(block_bytes), b""))
    return StoredObject(name, found.sha256, found.bytes, block_bytes, "".join(found.crc32))


def new_attempt() -> str:
    """A fresh attempt id: 8 hex digits, random."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True)
class StoredObject:
    """A file in the dataset's folder that never changes."""

    name: str
    sha256: str
    bytes: int
    block_bytes: int = 0
    """Size of the blocks that have checksums of their own, so that damage can be located; 0: there are none."""
    crc32: str = ""
    """CRC-32 of each block, 8 hex digits each."""


@dataclass(frozen=True)
class Receipt:
    """What a commit record says."""

    stage: str
    stage_hash: str
    shard: int
    attempt: str
    generation: int
    """Generation of the plan that the shard belongs to."""
    samples_ok: int
    samples_failed: int
    failed_keys: tuple[str, ...]
    """Samples that failed in this stage; the ledger says why."""
    keys_digest: str
    """sha256 of the keys that succeeded, in order."""
    upstream: dict[str, str]
    """Upstream stage -> its attempt."""
    objects: tuple[StoredObject, ...] = ()
    ledger: str | None = None
    """Name of the error ledger of this attempt."""
    seconds: float = 0.0
    """Time to compute, of all attempts together."""
    finished_at: str = ""
    """UTC, ISO 8601."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Volatile facts: versions, host, device."""
    number: int = 1
    """Which attempt at the shard it is: 1, 2, ...; the highest counts."""
    lost_keys: tuple[str, ...] = ()
    """Planned samples that it did not get, because a stage before had lost them."""
    images: tuple[str, ...] = ()
    """Tars: where each sample's image lies (`shards.spell_image`), in order.

    So nobody needs to walk the tar to find one.
    """

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Receipt:
        """The inverse of `to_json`. Raises KeyError or TypeError."""
        objects = tuple(StoredObject(**item) for item in values["objects"])
        tuples = {name: tuple(values[name]) for name in ("failed_keys", "lost_keys", "images")}
        return cls(**{**values, **tuples, "objects": objects})


def discard(folder: Folder, names: Sequence[str]) -> None:
    """Delete files of an attempt that lost. What cannot be deleted stays behind unseen."""
    for name in names:
        try:
            folder.remove(name)
        except Exception:  # an unseen leftover is harmless, and the caller's own error matters more
            continue


PIECE_BYTES = 1 << 20
"""How much is read at a time of objects that were recorded without blocks."""


What = Literal["gone", "cut off", "changed", "unreadable"]


@dataclass(frozen=True)
class Difference:
    what: What
    blocks: tuple[int, ...] = field(default=())
    """Numbers of the blocks that differ; empty where the record has none."""


def is_whole(folder: Folder, stored: StoredObject) -> bool:
    """Whether an object is as recorded."""
    return difference(folder, stored) is None


def difference(folder: Folder, stored: StoredObject) -> Difference | None:
    try:
        found = fingerprint(folder.chunks(stored.name, stored.block_bytes or PIECE_BYTES))
    except FileNotFoundError:
        return Difference("gone")
    if found.sha256 == stored.sha256:
        return None
    recorded = [stored.crc32[start : start + 8] for start in range(0, len(stored.crc32), 8)]
    differ = tuple(number for number, crc in enumerate(recorded) if found.crc32[number : number + 1] != (crc,))
    return Difference("cut off" if found.bytes < stored.bytes else "changed", differ)
