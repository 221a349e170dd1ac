"""Reads back everything that the commits that count and the plan name, and says what is not as recorded.

Computes no image.

Invariants:
- Every object is hashed whole, in blocks, several at a time; never more than a few blocks of each are in memory.
- Reading finds damage; only `note` writes: marks of damage, which a repair follows, and which it takes away again.
- Only what the current configuration's commits name can be mended; damage elsewhere is told all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Difference, Receipt, StoredObject, What, difference
from resmaster_stages.dataset.commits import all_records
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_is_whole
from resmaster_stages.dataset.plan import find_plan
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.shards import read_index
from resmaster_stages.storage.tables import decode_table

THREADS = 8
WINDOW = 64 * THREADS
"""Objects in hand at a time: the list of all of them is never kept."""
HEADER_BYTES = 512
"""A member's header in a tar, before its content."""


@dataclass(frozen=True)
class Damage:
    """One object that is not as recorded."""

    stage: str
    shard: int | None
    name: str
    what: What
    samples: tuple[str, ...] = ()
    """Keys of the samples that lie in the changed part; empty where it cannot be told (tables, records)."""
    current: bool = True
    """Whether a commit of the current configuration, or the plan, names it."""


@dataclass(frozen=True)
class Verification:
    """What was read, and what is wrong with it."""

    objects: int
    bytes: int
    damage: tuple[Damage, ...]


@dataclass(frozen=True)
class _Named:
    """An object that a record names."""

    stage: str
    shard: int | None
    stored: StoredObject
    current: bool
    ledger: bool = False


def verify(dataset: Dataset) -> Verification:
    """Hash all that the plan and every commit that counts name.

    Raises only what keeps the store from being read at all.
    """
    damage: list[Damage] = []
    places = _SamplePlaces(dataset.folder)
    count = size = 0
    with ThreadPoolExecutor(THREADS) as pool:
        stream = _named(dataset, damage)
        while window := list(islice(stream, WINDOW)):
            for named, found in zip(window, pool.map(lambda named: _check(dataset.folder, named), window)):
                count += 1
                size += named.stored.bytes
                if found is not None:
                    samples = places.of(named.stored, found)
                    damage.append(
                        Damage(named.stage, named.shard, named.stored.name, found.what, samples, named.current)
                    )
    order = {stage: number for number, stage in enumerate(("plan", *STAGES))}
    damage.sort(key=lambda found: (order[found.stage], found.shard or 0, found.name))
    return Verification(count, size, tuple(damage))


def note(dataset: Dataset, found: Verification) -> None:
    """Mark the damaged shards of the current configuration, for a repair to follow; clear the marks of all others."""
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        damaged: dict[int, list[str]] = {}
        for damage in found.damage:
            if damage.current and damage.stage == stage and damage.shard is not None:
                damaged.setdefault(damage.shard, []).append(damage.name)
        for shard, names in damaged.items():
            commits.mark(shard, names)
        for shard in commits.marked():
            if shard not in damaged:
                commits.unmark(shard)


# ----------------------------------------------------------------------------------------------------------------------
# what is named, and whether it is there


def _named(dataset: Dataset, damage: list[Damage]) -> Iterator[_Named]:
    """All objects that records name; records that cannot be read go to `damage`."""
    for generation in find_plan(dataset.folder).generations:
        for stored in [part.stored for part in generation.parts] + (
            [generation.rejected] if generation.rejected else []
        ):
            yield _Named("plan", None, stored, True)
    current = {layout.commit_folder(stage, own_hash) for stage, own_hash in dataset.hashes.items()}
    for record in all_records(dataset.folder):
        group = record.name.rsplit("/", 1)[0]
        place = layout.attempt_of(record.name)
        if record.receipt is None:
            stage = next((stage for stage in STAGES if group.startswith(f"{layout.COMMITS}/{stage}-")), None)
            if stage is not None:
                shard = place[0] if place else None
                damage.append(Damage(stage, shard, record.name, "unreadable", (), group in current))
        elif record.successor is None:
            yield from _objects(record.receipt, group in current)


def _objects(receipt: Receipt, current: bool) -> Iterator[_Named]:
    for stored in receipt.objects:
        yield _Named(receipt.stage, receipt.shard, stored, current)
    if receipt.ledger:
        yield _Named(receipt.stage, receipt.shard, StoredObject(receipt.ledger, "", 0), current, ledger=True)


def _check(folder: Folder, named: _Named) -> Difference | None:
    if not named.ledger:
        return difference(folder, named.stored)
    if ledger_is_whole(folder, named.stored.name):
        return None
    return Difference("unreadable" if folder.exists(named.stored.name) else "gone")


class _SamplePlaces:
    """Which samples lie where in a tar: by the manifest, or else by the tar's own headers if they can still be read."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._manifest: dict[str, list[tuple[int, str]]] | None = None

    def of(self, stored: StoredObject, found: Difference) -> tuple[str, ...]:
        """The keys of the samples in the changed blocks of a tar, in order; all if it is gone or has no blocks."""
        if not stored.name.endswith(".tar"):
            return ()
        places = self._from_manifest().get(stored.name) or self._from_headers(stored.name)
        ends = [start for start, _ in places[1:]] + [stored.bytes]
        extents = [(start, end, key) for (start, key), end in zip(places, ends)]
        if found.what == "gone" or not found.blocks:
            return tuple(key for _, _, key in extents)
        ranges = [(number * stored.block_bytes, (number + 1) * stored.block_bytes) for number in found.blocks]
        return tuple(key for start, end, key in extents if any(start < last and first < end for first, last in ranges))

    def _from_manifest(self) -> dict[str, list[tuple[int, str]]]:
        """Object -> (first byte of the sample, key), by place."""
        if self._manifest is None:
            self._manifest = {}
            try:
                table = decode_table(self.folder.read(layout.MANIFEST), manifest_schema(), layout.MANIFEST)
            except (FileNotFoundError, ShardError):
                return self._manifest
            for stage in ("low_res", "high_res"):
                names = (f"{stage}_object", f"{stage}_offset", "key")
                for name, offset, key in zip(*(table[column].to_pylist() for column in names)):
                    self._manifest.setdefault(name, []).append((offset - HEADER_BYTES, key))
            for places in self._manifest.values():
                places.sort()
        return self._manifest

    def _from_headers(self, name: str) -> list[tuple[int, str]]:
        try:
            with self.folder.open(name) as file:
                entries = read_index(file, name)
        except (OSError, ShardError):
            return []
        return [(next(iter(entry.members.values())).offset - HEADER_BYTES, entry.key) for entry in entries]
