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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset import layout
from resmaster_stages.errors import ShardError
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

    stage: Stage
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
    """Time to compute."""
    finished_at: str = ""
    """UTC, ISO 8601."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Volatile facts: versions, host, device."""
    supplement: int = 0
    """0 for a shard's commit; 1, 2, ... for what was added later."""
    keys: tuple[str, ...] = ()
    """Supplements: the samples that it holds, in order."""
    request: int = 0
    """Supplements: the last request that it answers."""
    images: tuple[str, ...] = ()
    """Tars: where each sample's image lies (`shards.spell_image`), in order, so that nobody needs to walk the tar to
    find one. Empty in records of earlier versions."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Receipt:
        """The inverse of `to_json`. Raises KeyError or TypeError."""
        objects = tuple(StoredObject(**item) for item in values["objects"])
        keys, failed = tuple(values.get("keys", ())), tuple(values["failed_keys"])
        images = tuple(values.get("images", ()))
        return cls(**{**values, "objects": objects, "failed_keys": failed, "keys": keys, "images": images})


def commit(folder: Folder, receipt: Receipt, files: Sequence[tuple[str, Path]], ledger: bytes | None) -> Receipt:
    """Upload `files` (name in the dataset, validated local file) and commit `receipt` with them.

    `ledger` is the content of this attempt's error ledger, if samples failed.
    Returns the receipt that counts: ours, or that of the attempt that won the race.
    """
    stored = tuple(describe(name, path) for name, path in files)
    ledger_name = layout.ledger(receipt.stage, receipt.shard, receipt.attempt) if ledger is not None else None
    receipt = replace(receipt, objects=stored, ledger=ledger_name)
    own = [name for name, _ in files] + ([ledger_name] if ledger_name else [])
    try:
        if ledger is not None and ledger_name:
            folder.write(ledger_name, ledger)
        for name, path in files:
            folder.upload(name, path)
    except Exception:
        discard(folder, own)
        raise
    place = (receipt.stage, receipt.stage_hash, receipt.shard, receipt.supplement)
    name = layout.commit(*place)
    text = json.dumps(receipt.to_json(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        folder.create(name, text.encode())
    except FileExistsError as error:
        winner = read_commit(folder, *place)
        if winner is None:
            raise ShardError(f"{folder.url_of(name)}: was there and is gone; run the same command again") from error
        if winner.attempt != receipt.attempt:
            discard(folder, own)
        return winner
    except Exception:
        # The store may have kept the record although its answer got lost.
        winner = read_commit(folder, *place)
        if winner is None or winner.attempt != receipt.attempt:
            raise
        return winner
    return receipt


def read_commit(folder: Folder, stage: Stage, stage_hash: str, shard: int, supplement: int = 0) -> Receipt | None:
    """The commit record of a shard, or of one of its supplements, or None. Raises ShardError if it is damaged."""
    name = layout.commit(stage, stage_hash, shard, supplement)
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return None
    return _parse(folder, name, data, stage_hash)


def committed_shards(folder: Folder, stage: Stage, stage_hash: str) -> list[int]:
    """The shards that are committed, from one listing of the stage's commit records."""
    names = folder.names(layout.commit_folder(stage, stage_hash))
    return sorted(shard for name in names if (shard := layout.number_of(name)) is not None)


def all_commits(folder: Folder) -> Iterator[tuple[str, Receipt | None]]:
    """Every commit record there is, supplements too, of whichever configuration, by name; None for one that cannot be
    read."""
    for group in folder.names(layout.COMMITS):
        names = [name for name in folder.names(group) if layout.is_commit(name)]
        for start in range(0, len(names), 1000):
            for name, data in sorted(folder.read_many(names[start : start + 1000]).items()):
                try:
                    receipt = Receipt.from_json(json.loads(data))
                    place = (receipt.stage, receipt.stage_hash, receipt.shard, receipt.supplement)
                    good = layout.commit(*place) == name
                except (ValueError, KeyError, TypeError):
                    good = False
                yield name, receipt if good else None


def list_commits(folder: Folder, stage: Stage, stage_hash: str) -> dict[int, Receipt]:
    """Shard -> commit record, for all that are committed. Raises ShardError if one is damaged."""
    return read_commits(folder, stage, stage_hash, committed_shards(folder, stage, stage_hash))


def read_commits(folder: Folder, stage: Stage, stage_hash: str, shards: Sequence[int]) -> dict[int, Receipt]:
    """Shard -> commit record, for those of `shards` that are committed. Raises ShardError if one is damaged."""
    names = [layout.commit(stage, stage_hash, shard) for shard in shards]
    receipts = [_parse(folder, name, data, stage_hash) for name, data in folder.read_many(names).items()]
    return {receipt.shard: receipt for receipt in receipts}


def _parse(folder: Folder, name: str, data: bytes, stage_hash: str) -> Receipt:
    place = folder.url_of(name)
    try:
        receipt = Receipt.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{place}: damaged commit record ({error}); run: resmaster verify {folder.url}, then: resmaster repair"
        ) from error
    if receipt.stage_hash != stage_hash or name != layout.commit(
        receipt.stage, stage_hash, receipt.shard, receipt.supplement
    ):
        raise ShardError(f"{place}: belongs to another shard or configuration; delete it, then run: resmaster repair")
    return receipt


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
