"""Reads every object that the plan, the valid commits and the publication name, and reports those that differ from
their record.

Invariants:
- Every object is hashed completely, in pieces, several objects at a time. Only a few pieces of each are in memory.
- `verify` writes nothing. Only `note` writes: damage marks, which a repair reads and removes.
- Only objects of the current configuration's commits can be mended. Damage to other objects is reported too.
- Records of failed attempts are not checked. They are notes, and no data depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject, difference
from resmaster_stages.dataset.commits import all_records
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_is_whole
from resmaster_stages.dataset.plan import find_plan
from resmaster_stages.dataset.publication import read_publication
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder

THREADS = 8
WINDOW = 64 * THREADS
"""Number of objects handled at a time, so that the list of all objects is never in memory."""
What = Literal["gone", "cut off", "changed", "unreadable"]
PUBLICATION = "publication"
"""Stands in the place of the stage for published files."""


@dataclass(frozen=True)
class Damage:
    """One object that is not as recorded."""

    stage: str
    shard: int | None
    name: str
    what: What
    current: bool = True
    """Whether a commit of the current configuration, the plan or the publication names it."""


@dataclass(frozen=True)
class Verification:
    """The number and size of the objects read, and the damage found."""

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
    """Hash every object that the plan, the valid commits and the publication name.

    Damaged objects are reported, not raised. Raises only errors that keep the store from being read.
    """
    damage: list[Damage] = []
    count = size = 0
    with ThreadPoolExecutor(THREADS) as pool:
        stream = _named(dataset, damage)
        while window := list(islice(stream, WINDOW)):
            for named, found in zip(window, pool.map(lambda named: _check(dataset.folder, named), window)):
                count += 1
                size += named.stored.bytes
                if found is not None:
                    damage.append(Damage(named.stage, named.shard, named.stored.name, found, named.current))
    order = {stage: number for number, stage in enumerate(("plan", *STAGES, PUBLICATION))}
    damage.sort(key=lambda found: (order[found.stage], found.shard or 0, found.name))
    return Verification(count, size, tuple(damage))


def note(dataset: Dataset, found: Verification) -> None:
    """Mark the damaged shards of the current configuration for repair, and remove the marks of all other shards."""
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
    """All objects that records name. Unreadable records are added to `damage`."""
    for generation in find_plan(dataset.folder).generations:
        for stored in generation.objects:
            yield _Named("plan", None, stored, True)
    current = {layout.commit_folder(stage, own_hash) for stage, own_hash in dataset.hashes.items()}
    for record in all_records(dataset.folder):
        group = record.name.rsplit("/", 1)[0]
        place = layout.attempt_of(record.name)
        if record.receipt is None:
            stage = next((stage for stage in STAGES if group.startswith(f"{layout.COMMITS}/{stage}-")), None)
            if stage is not None:
                shard = place[0] if place else None
                damage.append(Damage(stage, shard, record.name, "unreadable", group in current))
        elif record.successor is None:
            yield from _objects(record.receipt, group in current)
    try:
        publication = read_publication(dataset.folder)
    except ShardError:
        damage.append(Damage(PUBLICATION, None, layout.PUBLICATION, "unreadable"))
    else:
        yield from (_Named(PUBLICATION, None, file, True) for file in (publication.files if publication else ()))


def _objects(receipt: Receipt, current: bool) -> Iterator[_Named]:
    for stored in receipt.objects:
        yield _Named(receipt.stage, receipt.shard, stored, current)
    if receipt.ledger:
        yield _Named(receipt.stage, receipt.shard, StoredObject(receipt.ledger, "", 0), current, ledger=True)


def _check(folder: Folder, named: _Named) -> What | None:
    if not named.ledger:
        return difference(folder, named.stored)
    if ledger_is_whole(folder, named.stored.name):
        return None
    return "unreadable" if folder.exists(named.stored.name) else "gone"
