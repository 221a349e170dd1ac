"""Reads every object that the plan, the valid commits and the publication name. Reports objects that differ from their
record, and records that are lost, cannot be read or contradict each other.

Invariants:
- Every object is hashed completely, in pieces, several objects at a time. Only a few pieces of each are in memory.
- `verify` writes nothing. Only `note` writes: damage marks, which a repair reads and removes.
- Each damage says what mends it (`Damage.mend`). What a repair cannot mend is reported too (`BY_HAND`).
- A lost commit record is noticed by what was published of its shard. A lost request to make samples again is noticed by
  the commits that fulfilled it.
- Records of failed attempts are not checked. They are notes, and no data depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject, difference
from resmaster_stages.dataset.commits import Record, all_records
from resmaster_stages.dataset.dataset import Dataset, config_values, current_config
from resmaster_stages.dataset.exclusions import exclusion_names, parse_exclusion
from resmaster_stages.dataset.ledger import ledger_is_whole
from resmaster_stages.dataset.lost_plan import PLAN_GONE, LostRecord, survey
from resmaster_stages.dataset.plan import Plan, fits
from resmaster_stages.dataset.publication import PublicationRecord, read_publication
from resmaster_stages.dataset.redo import parse_request, raise_to, request_names
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.inspection.published import published_shards
from resmaster_stages.storage.digests import DigestSet, digest_of
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.store_errors import is_damage, is_unreadable

THREADS = 8
WINDOW = 64 * THREADS
"""Number of objects handled at a time, so that the list of all objects is never in memory."""
What = Literal["gone", "cut off", "changed", "unreadable", "of other samples than the plan's", "named by no commit"]
CONFIGURATION, PLAN, REQUESTS, PUBLICATION = "configuration", "plan", "requests", "publication"
"""Stand in the place of the stage for files that are of no stage."""

AGAIN = "repair makes it again"
RECORD_GONE = "restore it from a copy, or repair makes the shard again"
RECORD_UNREADABLE = "restore it from a copy, or repair makes the shard again, and what was made from it"
OLDER = "of an older configuration: restore it from a copy, if you still need that"
RECORD_OF_PLAN = "repair puts it together again from the plan's files"
CONFIG_GONE = "restore it from a copy; without one, delete it and run the same configuration again"
CONTRADICTION = "restore plan/ or this record from a copy, whichever is not of this dataset"
UNNAMED = "restore its commit record from a copy, or repair publishes what is committed"
REQUEST_GONE = "restore it from a copy; without one, delete it and ask for its samples again, with repair --redo"
EXCLUSION_GONE = "restore it from a copy; without one, delete it and exclude its samples again, with run --exclude"
BY_HAND = (PLAN_GONE, CONFIG_GONE, CONTRADICTION, OLDER, REQUEST_GONE, EXCLUSION_GONE)
"""What `repair` does not mend."""


@dataclass(frozen=True)
class Damage:
    """One object that is not as recorded."""

    stage: str
    shard: int | None
    name: str
    what: What
    current: bool = True
    """Whether a commit of the current configuration, the plan or the publication names it."""
    mend: str = field(default="", compare=False)
    """What to do about it."""


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

    @property
    def mend(self) -> str:
        if self.stage in (CONFIGURATION, PLAN):
            return CONFIG_GONE if self.stage == CONFIGURATION else PLAN_GONE
        return AGAIN if self.current else OLDER


def verify(dataset: Dataset) -> Verification:
    """Hash every object that the plan, the valid commits and the publication name, and compare the records.

    Damage is reported, not raised. Raises only errors that keep the store from being read.
    """
    damage: list[Damage] = []
    objects = size = 0
    with ThreadPoolExecutor(THREADS) as pool:
        stream = _named(dataset, damage)
        while window := list(islice(stream, WINDOW)):
            for named, found in zip(window, pool.map(lambda named: _check(dataset.folder, named), window)):
                objects += 1
                size += named.stored.bytes
                if found is not None:
                    damage.append(Damage(named.stage, named.shard, named.stored.name, found, named.current, named.mend))
    order = {stage: number for number, stage in enumerate((CONFIGURATION, PLAN, REQUESTS, *STAGES, PUBLICATION))}
    by_name = {found.name: found for found in damage}
    damage = sorted(by_name.values(), key=lambda found: (order[found.stage], found.shard or 0, found.name))
    return Verification(objects, size, tuple(damage))


def note(dataset: Dataset, found: Verification) -> None:
    """Mark the damaged shards of the current configuration for repair, and remove the marks of all other shards."""
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        damaged: dict[int, list[str]] = {}
        for damage in found.damage:
            # a shard whose record is gone is made again without a mark
            if damage.current and damage.stage == stage and damage.shard is not None and damage.mend != RECORD_GONE:
                damaged.setdefault(damage.shard, []).append(damage.name)
        for shard, names in damaged.items():
            commits.mark(shard, names)
        for shard in commits.marked():
            if shard not in damaged:
                commits.unmark(shard)


# ----------------------------------------------------------------------------------------------------------------------
# what is named, and whether it is there


def _named(dataset: Dataset, damage: list[Damage]) -> Iterator[_Named]:
    """All objects that records name. What is wrong with records themselves is added to `damage`."""
    folder = dataset.folder
    damage += _configurations(folder)
    plan, lost = survey(folder)
    damage += (_lost(record) for record in lost)
    for generation in plan.generations:
        yield from (_Named(PLAN, None, stored, True) for stored in generation.objects)
    requests = _Requests(folder)
    damage += requests.damage
    current = {layout.commit_folder(stage, own_hash) for stage, own_hash in dataset.hashes.items()}
    known = _Known()
    for record in all_records(folder):
        known.add(record)
        if record.receipt is None:
            damage += _unreadable(record, current)
            continue
        damage += _contradiction(plan, record.name, record.receipt)
        damage += requests.lost(record.receipt)
        if record.successor is None:
            yield from _objects(record.receipt, record.name.rpartition("/")[0] in current)
    try:
        publication = read_publication(folder)
    except ShardError:
        damage.append(Damage(PUBLICATION, None, layout.PUBLICATION, "unreadable", mend=AGAIN))
        return
    if publication is not None:
        yield _Named(CONFIGURATION, None, publication.config, True)
        yield from (_Named(PUBLICATION, None, file, True) for file in publication.files)
        if list(_withdrawn(folder, publication, current, known)):
            for record in all_records(folder):  # a run may have committed and published since they were read
                known.add(record)
            damage += _withdrawn(folder, publication, current, known)


def _configurations(folder: Folder) -> Iterator[Damage]:
    """What is wrong with the configurations, of which the last one was read already."""
    last = layout.number_of(current_config(folder)) or 0
    for name in (layout.CONFIG, *map(layout.changed_config, range(1, last))):
        what: What = "unreadable"
        try:
            config_values(folder.read(name))
            continue
        except FileNotFoundError:
            what = "gone"
        except (ValueError, OSError, UserError) as error:
            if not isinstance(error, ValueError) and not is_damage(error):
                raise
        yield Damage(CONFIGURATION, None, name, what, mend=CONFIG_GONE)


def _lost(record: LostRecord) -> Damage:
    return Damage(PLAN, None, record.name, record.what, mend=RECORD_OF_PLAN if record.generation else PLAN_GONE)


def _unreadable(record: Record, current: set[str]) -> Iterator[Damage]:
    """The damage that a commit record is which cannot be read, if it is in the place of one."""
    group = record.name.rpartition("/")[0]
    namespace, place = layout.namespace_of(group), layout.attempt_of(record.name)
    if namespace and namespace[0] in STAGES and place:
        own = group in current
        yield Damage(namespace[0], place[0], record.name, "unreadable", own, mend=RECORD_UNREADABLE if own else OLDER)


def _contradiction(plan: Plan, name: str, receipt: Receipt) -> Iterator[Damage]:
    """The damage that a commit record is which is of other samples than the plan's."""
    try:
        if receipt.shard >= plan.shards or fits(plan, receipt):
            return
    except PlanError:  # a file of the plan is damaged, which is reported already
        return
    yield Damage(receipt.stage, None, name, "of other samples than the plan's", mend=CONTRADICTION)


class _Requests:
    """The requests to make samples again, and the lists of keys that are never planned."""

    def __init__(self, folder: Folder) -> None:
        self.damage: list[Damage] = []
        """The records that cannot be read."""
        self._takes: dict[str, int] = {}
        requests = request_names(folder)
        for names, parse, mend in (
            (requests, self._add, REQUEST_GONE),
            (exclusion_names(folder), parse_exclusion, EXCLUSION_GONE),
        ):
            found = folder.read_many(names, lenient=True)
            for name in names:
                try:
                    parse(name, found.get(name, b""))
                except ValueError:
                    self.damage.append(Damage(REQUESTS, None, name, "unreadable", mend=mend))
        self._gone = next(name for name in map(layout.redo, count(1)) if name not in requests)

    def _add(self, name: str, data: bytes) -> None:
        for takes in parse_request(name, data).takes.values():
            raise_to(self._takes, takes)

    def lost(self, receipt: Receipt) -> Iterator[Damage]:
        """The damage that a request is gone which a commit has fulfilled. Not told while another cannot be read."""
        if not self.damage and any(self._takes.get(key, 0) < take for key, take in receipt.takes.items()):
            yield Damage(REQUESTS, None, self._gone, "gone", mend=REQUEST_GONE)


class _Known:
    """The names of all commit records, and of all objects that these name. Memory holds digests."""

    def __init__(self) -> None:
        self.names = DigestSet()
        self.unreadable: set[tuple[str, int]] = set()
        """Folder and shard of records that cannot be read, so that what they name is not known."""

    def add(self, record: Record) -> None:
        """Add a record and its objects."""
        self.names.add(digest_of(record.name))
        for stored in record.receipt.objects if record.receipt else ():
            self.names.add(digest_of(stored.name))
        if record.receipt is None and (place := layout.attempt_of(record.name)):
            self.unreadable.add((record.name.rpartition("/")[0], place[0]))

    def __contains__(self, name: str) -> bool:
        return digest_of(name) in self.names


def _withdrawn(folder: Folder, publication: PublicationRecord, current: set[str], known: _Known) -> Iterator[Damage]:
    """Commit records that are gone although their shard is published, and published objects that no record names."""
    for stage, own_hash in publication.stages.items():
        group = layout.commit_folder(stage, own_hash)
        for number in range(publication.shards):
            if (record := layout.commit(stage, own_hash, number)) not in known:
                yield _record_gone(stage, number, record, group in current)
    for shard in published_shards(folder, publication):
        for stage, record in shard.records.items():
            group = record.rpartition("/")[0]
            name = shard.objects.get(stage, record)
            if record not in known:
                yield _record_gone(stage, shard.number, record, group in current)
            elif name not in known and (group, shard.number) not in known.unreadable:
                yield Damage(stage, None, name, "named by no commit", mend=UNNAMED)


def _record_gone(stage: str, shard: int, name: str, current: bool) -> Damage:
    return Damage(stage, shard, name, "gone", current, mend=RECORD_GONE if current else OLDER)


def _objects(receipt: Receipt, current: bool) -> Iterator[_Named]:
    for stored in receipt.objects:
        yield _Named(receipt.stage, receipt.shard, stored, current)
    if receipt.ledger:
        yield _Named(receipt.stage, receipt.shard, StoredObject(receipt.ledger, "", 0), current, ledger=True)


def _check(folder: Folder, named: _Named) -> What | None:
    try:
        if not named.ledger:
            return difference(folder, named.stored)
        if ledger_is_whole(folder, named.stored.name):
            return None
    except UserError as error:
        if not is_unreadable(error):
            raise
        return "unreadable"
    return "unreadable" if folder.exists(named.stored.name) else "gone"
