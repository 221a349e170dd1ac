"""Finds and removes files that are not needed any more.

These are objects that no commit names, objects that a later attempt replaced, curated shards that the curated index
does not name, probes, temporary files, unfinished uploads and caches of finished shards.

Invariants:
- Only names that this project gives to attempts, probes, caches and temporary files are considered. Other files are
  never touched.
- Never removed are objects that a valid commit or a plan record names, of any configuration; records, configurations
  and ledgers; and the cache of a shard that is not committed yet.
- Never removed is what a lost record may have named: objects that the manifest leads to; objects of a stage of a shard
  that is not committed; objects of published shards, and of shards with samples that failed, were lost or were asked
  for again, while no whole publication is of the commits that are there; and the files of a generation of the plan
  whose record is gone or cannot be read.
- Objects of a replaced attempt are removed only if the manifest was written after the later attempt, and is itself
  older than the limit. So readers of an older manifest had the grace period to finish.
- Files are listed before the records are read, so records name all objects committed in between. Objects that are
  still being uploaded are younger than the limit.
- For objects of attempts, memory holds a 12-byte digest per file, and names only of leftovers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import all_records
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.lost_plan import survey
from resmaster_stages.dataset.publication import PublicationRecord, read_publication
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.inspection.published import published_shards
from resmaster_stages.inspection.status import status
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.digests import DigestSet, digest_of
from resmaster_stages.storage.filesystem import Folder, Listed
from resmaster_stages.storage.probe import is_probe

Kind = Literal["object", "curated shard", "plan file", "probe", "temporary file", "cache", "unfinished upload"]


@dataclass(frozen=True)
class Leftover:
    """One file that may be deleted."""

    kind: Kind
    file: Listed
    upload: str = ""
    """Id of the upload, for unfinished uploads."""


def find_leftovers(dataset: Dataset, older_than: timedelta, now: datetime | None = None) -> list[Leftover]:
    """The leftovers of a dataset that are older than `older_than`, by the store's clock. Without unfinished uploads if
    the store does not list them (`unlisted_uploads`).

    Raises UserError if a commit record cannot be read, because the objects that it names would look like leftovers.
    """
    folder = dataset.folder
    limit = (now or datetime.now(UTC)) - older_than
    attempts, others = DigestSet(), list[Listed]()
    for file in folder.files():
        if file.modified < limit:
            if layout.is_attempt(file.name):
                attempts.add(digest_of(file.name))
            elif _kind(file.name, ()):
                others.append(file)
    uploads = [Leftover("unfinished upload", file, upload) for file, upload in _uploads(folder)]
    named = DigestSet()
    for name in _named(folder, limit):
        if (digest := digest_of(name)) in attempts:
            named.add(digest)
    if len(named) < len(attempts):  # only digests are held, so the names are listed again
        vouched = _Vouched(dataset)
        others += [
            file
            for file in folder.files()
            if layout.is_attempt(file.name)
            and (digest := digest_of(file.name)) in attempts
            and digest not in named
            and file.name in vouched
        ]
    unfinished, curated = _unfinished_caches(dataset), _curated(folder, limit)
    found = [
        Leftover(kind, file)
        for file in sorted(others, key=lambda file: file.name)
        if file.name not in curated and (kind := _kind(file.name, unfinished))
    ]
    return found + [leftover for leftover in uploads if leftover.file.modified < limit]


def remove_leftovers(folder: Folder, leftovers: Collection[Leftover]) -> None:
    """Delete leftovers."""
    for leftover in leftovers:
        if leftover.upload:
            folder.abort_upload(leftover.file.name, leftover.upload)
        else:
            folder.remove(leftover.file.name)


def unlisted_uploads(folder: Folder) -> str:
    """Why unfinished uploads cannot be listed in a store that lists files; "" if they can."""
    try:
        folder.unfinished_uploads()
    except UserError as error:
        return str(error)
    return ""


def _uploads(folder: Folder) -> list[tuple[Listed, str]]:
    try:
        return folder.unfinished_uploads()
    except UserError:
        return []


def _kind(name: str, unfinished: Collection[str]) -> Kind | None:
    """The kind of leftover that a name may be; None for names that are never touched."""
    if layout.is_temporary(name):
        return "temporary file"
    if is_probe(name):
        return "probe"
    if layout.is_curated(name):
        return "curated shard"
    if layout.is_attempt(name):
        return "plan file" if name.startswith(f"{layout.PLAN}/") else "object"
    if name.startswith(f"{layout.CACHE}/"):
        entry = name.split("/")[1]
        return None if entry in unfinished else "cache"
    return None


def _named(folder: Folder, limit: datetime) -> Iterator[str]:
    """All objects that records name, except those of replaced attempts that no reader has needed since `limit`."""
    for generation in survey(folder)[0].generations:
        yield from (stored.name for stored in generation.objects)
    yield from _published(folder)
    published = folder.modified(layout.MANIFEST) if folder.exists(layout.MANIFEST) else None
    for record in all_records(folder):
        if record.receipt is None:
            place = quoted(folder.url)
            raise UserError(
                f"{record.name} cannot be read; first run: resmaster verify {place}, then: resmaster repair {place}"
            )
        if record.successor and published and folder.modified(record.successor) < published < limit:
            continue
        yield from (stored.name for stored in record.receipt.objects)


def _published(folder: Folder) -> Iterator[str]:
    """The objects that the manifest leads readers to. None if there is no manifest that is as it was published."""
    if publication := _publication(folder):
        for shard in published_shards(folder, publication):
            yield from shard.objects.values()


def _curated(folder: Folder, limit: datetime) -> set[str]:
    """The copies of shards that readers may need: those that the curated index names, and all of them if the dataset
    was published since `limit` or the index cannot be read."""
    everything = {*folder.names(layout.CURATED)}
    if not everything or not folder.exists(layout.PUBLICATION) or folder.modified(layout.PUBLICATION) >= limit:
        return everything
    try:
        return {shard["url"] for shard in json.loads(folder.read(layout.CURATED_INDEX))["shardlist"]}
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError, KeyError):  # damaged, which `verify` reports
        return everything


def _publication(folder: Folder) -> PublicationRecord | None:
    """The record of the publication; None if it is not there or cannot be read, which `verify` reports."""
    try:
        return read_publication(folder)
    except ShardError:
        return None


def _fits(dataset: Dataset) -> bool:
    """Whether the publication is whole and of the commits that are there. Not so if the plan does not tell."""
    try:
        return status(dataset).published.of_the_commits
    except PlanError:
        return False


class _Vouched:
    """The names of attempts (`in` tells) of which it is sure that no lost record named them: their shard is committed
    in their stage, and either the publication is of these commits, or the shard is not published and had no later
    attempt; or their generation of the plan has a record."""

    def __init__(self, dataset: Dataset) -> None:
        folder = dataset.folder
        self._shards: dict[str, set[int]] = {}
        """Stage -> shards with a commit of the current configuration, or of any if it does not need the stage."""
        for group in folder.names(layout.COMMITS):
            stage, own_hash = layout.namespace_of(group) or ("", "")
            if own_hash == dataset.hashes.get(stage, own_hash)[:8]:
                places = filter(None, map(layout.attempt_of, folder.names(group)))
                self._shards.setdefault(stage, set()).update(shard for shard, _ in places)
        publication = _publication(folder)
        if publication is None or not _fits(dataset):
            self._doubt(folder, publication)
            for shards in self._shards.values():
                shards -= dataset.redos.shards
        plan, lost = survey(folder)
        there = {layout.plan_record(generation.number) for generation in plan.generations}
        there -= {record.name for record in lost}
        self._doubtful = {
            number
            for place in folder.names(layout.PLAN)
            if (number := layout.generation_of(place)) is not None and layout.plan_record(number) not in there
            if lost or any(map(layout.is_plan_part, folder.names(place)))
        }
        """Generations that have files and no readable record."""

    def _doubt(self, folder: Folder, publication: PublicationRecord | None) -> None:
        """Take out shards of which a later attempt may have lost its record: those that are published, and those whose
        last record left samples out. (Those with requests to make samples again are taken out too.)"""
        if publication:
            published = {shard.number for shard in published_shards(folder, publication)}
            for shards in self._shards.values():
                shards -= published.union(range(publication.shards))
        for record in all_records(folder):
            receipt = record.receipt
            if receipt and not record.successor and (receipt.failed_keys or receipt.lost_keys):
                self._shards.get(receipt.stage, set()).discard(receipt.shard)

    def __contains__(self, name: str) -> bool:
        if place := layout.object_of(name):
            return place[1] in self._shards.get(place[0], ())
        return layout.generation_of(name) not in self._doubtful


def _unfinished_caches(dataset: Dataset) -> set[str]:
    """The caches that a run may still need: of the current configuration, for shards that are not committed."""
    names = {name.split("/")[1] for name in dataset.folder.names(layout.CACHE)}
    current = tuple(f"{stage}-{own_hash[:8]}-" for stage, own_hash in dataset.hashes.items())
    unfinished = {name for name in names if name.startswith(current)}
    if unfinished:
        for stage, own_hash in dataset.hashes.items():
            unfinished.difference_update(
                layout.spill_folder(stage, own_hash, shard).rsplit("/", 1)[-1]
                for shard in dataset.commits(stage).numbers()
            )
    return unfinished
