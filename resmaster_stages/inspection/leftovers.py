"""What no reader will ever need: objects that no commit names, probes, temporary files, caches of finished shards.

Invariants:
- Only names that this project gives to attempts, probes, caches and temporary files are looked at; all others are never
  touched.
- Never removed: what any commit or plan record names, of whichever configuration; records, configurations, ledgers; the
  cache of a shard that is not committed yet.
- The listing is made before the records are read, so what is committed meanwhile is named; what is still being uploaded
  is young.
- Of what is no leftover, 12 bytes a file are remembered, not names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import all_commits, committed_shards
from resmaster_stages.dataset.plan import find_plan
from resmaster_stages.errors import UserError
from resmaster_stages.storage.digests import DigestSet, digest_of
from resmaster_stages.storage.filesystem import Folder, Listed
from resmaster_stages.storage.probe import is_probe

Kind = Literal["object", "plan file", "probe", "temporary file", "cache", "unfinished upload"]


@dataclass(frozen=True)
class Leftover:
    """One file that may go."""

    kind: Kind
    file: Listed
    upload: str = ""
    """Unfinished uploads: their id."""


def find_leftovers(
    folder: Folder, hashes: Mapping[Stage, str], older_than: timedelta, now: datetime | None = None
) -> list[Leftover]:
    """The leftovers of the dataset in `folder` that are older than `older_than`, by the store's clock.

    `hashes` are those of the current configuration. Raises UserError if a commit record cannot be read: what it names
    would look like a leftover.
    """
    limit = (now or datetime.now(UTC)) - older_than
    attempts, others = DigestSet(), list[Listed]()
    for file in folder.files():
        if file.modified < limit:
            if layout.is_attempt(file.name):
                attempts.add(digest_of(file.name))
            elif _kind(file.name, ()):
                others.append(file)
    uploads = [Leftover("unfinished upload", file, upload) for file, upload in folder.unfinished_uploads()]
    named = DigestSet()
    for name in _named(folder):
        if (digest := digest_of(name)) in attempts:
            named.add(digest)
    if len(named) < len(attempts):  # only their digests are held: their names take another look
        others += [
            file
            for file in folder.files()
            if layout.is_attempt(file.name) and (digest := digest_of(file.name)) in attempts and digest not in named
        ]
    unfinished = _unfinished_caches(folder, hashes)
    found = [
        Leftover(kind, file)
        for file in sorted(others, key=lambda file: file.name)
        if (kind := _kind(file.name, unfinished))
    ]
    return found + [leftover for leftover in uploads if leftover.file.modified < limit]


def remove_leftovers(folder: Folder, leftovers: Collection[Leftover]) -> None:
    """Delete them."""
    for leftover in leftovers:
        if leftover.upload:
            folder.abort_upload(leftover.file.name, leftover.upload)
        else:
            folder.remove(leftover.file.name)


def _kind(name: str, unfinished: Collection[str]) -> Kind | None:
    """What sort of leftover a name may be; None for what is never touched."""
    if layout.is_temporary(name):
        return "temporary file"
    if is_probe(name):
        return "probe"
    if layout.is_attempt(name):
        return "plan file" if name.startswith(f"{layout.PLAN}/") else "object"
    if name.startswith(f"{layout.CACHE}/"):
        entry = name.split("/")[1].removesuffix(".json")
        return None if entry in unfinished else "cache"
    return None


def _named(folder: Folder) -> Iterator[str]:
    """What records name."""
    for generation in find_plan(folder).generations:
        yield from (part.stored.name for part in generation.parts)
        if generation.rejected:
            yield generation.rejected.name
    for name, receipt in all_commits(folder):
        if receipt is None:
            place = folder.url
            raise UserError(
                f"{name} cannot be read; first run: resmaster verify {place}, then: resmaster repair {place}"
            )
        yield from (stored.name for stored in receipt.objects)


def _unfinished_caches(folder: Folder, hashes: Mapping[Stage, str]) -> set[str]:
    """The caches that a run may still need: those of the current configuration whose shards are not committed."""
    names = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in folder.names(layout.CACHE)}
    current = tuple(f"{stage}-{own_hash[:8]}-" for stage, own_hash in hashes.items())
    unfinished = {name for name in names if name.startswith(current)}
    if unfinished:
        for stage, own_hash in hashes.items():
            unfinished.difference_update(
                layout.spill_folder(stage, own_hash, shard).rsplit("/", 1)[-1]
                for shard in committed_shards(folder, stage, own_hash)
            )
    return unfinished
