"""Second chances for failed samples of committed shards: supplements, which add to a shard and rewrite nothing.

A request (`000123.r01.json` beside the commit record) asks for another attempt at a stage's failed samples of one
shard. It is answered by a supplement (`000123.s01.json`): a commit of its own, with objects of its own, of the samples
that became good, and of those that failed again. What becomes good in a stage is due in the stages after it: they get
supplements without a request.

Invariants:
- A sample is held by at most one commit of a stage: a supplement takes only what no earlier one holds, and its number
  is created by exactly one writer.
- Requests and supplements belong to a stage's hash: another configuration starts afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, read_commit, read_commits
from resmaster_stages.storage.filesystem import Folder

CHUNK_SHARDS = 500
"""Shards whose records are read, in parallel where the store can, and held at a time."""


@dataclass(frozen=True)
class Link:
    """What is committed of one stage of one shard."""

    commit: Receipt | None = None
    supplements: tuple[Receipt, ...] = ()
    requests: int = 0
    """Number of the last request; 0 if there was none."""

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """The commit, then its supplements."""
        return (self.commit, *self.supplements) if self.commit else ()

    @cached_property
    def mended(self) -> frozenset[str]:
        """The samples that the supplements hold."""
        return frozenset(key for each in self.supplements for key in each.keys)

    @cached_property
    def failed(self) -> frozenset[str]:
        """The samples that failed in this stage and were not mended."""
        return frozenset(key for each in self.receipts for key in each.failed_keys) - self.mended

    @property
    def asked(self) -> bool:
        """Whether a request waits for its answer."""
        return self.requests > max((each.request for each in self.supplements), default=0)


@dataclass(frozen=True)
class Chain:
    """What is committed of one shard, stage by stage in pipeline order."""

    links: Mapping[Stage, Link]

    def holder(self, stage: Stage, key: str) -> Receipt | None:
        """The commit that holds the result of `stage` for a planned sample; None if there is none."""
        link = self.links[stage]
        if key not in self.lost(stage):
            return link.commit
        return next((supplement for supplement in link.supplements if key in supplement.keys), None)

    @cached_property
    def _lost(self) -> dict[Stage, frozenset[str]]:
        lost: frozenset[str] = frozenset()
        found: dict[Stage, frozenset[str]] = {}
        for stage, link in self.links.items():
            lost = found[stage] = lost.union(link.commit.failed_keys if link.commit else ())
        return found

    def lost(self, stage: Stage) -> frozenset[str]:
        """The samples that are not in the commit of `stage`, because it or one before it lost them."""
        return self._lost[stage]

    def before(self, stage: Stage) -> list[Stage]:
        """The stages before `stage`."""
        return list(self.links)[: list(self.links).index(stage)]

    def due(self, stage: Stage) -> frozenset[str]:
        """The samples for the next supplement of a committed stage: those that upstream got since, and, if they are
        asked for, those that failed."""
        link = self.links[stage]
        return frozenset(
            key
            for key in self.lost(stage) - link.mended
            if (link.asked or key not in link.failed) and all(self.holder(name, key) for name in self.before(stage))
        )

    def todo(self, stage: Stage) -> bool:
        """Whether `stage` has something to do: its commit, a supplement, or the answer to a request."""
        link = self.links[stage]
        return link.commit is None or link.asked or bool(self.due(stage))


def read_chain(folder: Folder, hashes: Mapping[Stage, str], shard: int, last: Stage) -> Chain:
    """One shard's commits, from the first stage to `last`. Raises ShardError if a record is damaged."""
    links: dict[Stage, Link] = {}
    lost: set[str] = set()
    for stage in list(hashes)[: list(hashes).index(last) + 1]:
        receipt = read_commit(folder, stage, hashes[stage], shard)
        lost.update(receipt.failed_keys if receipt else ())
        # Supplements and requests are about samples that were lost: where none was, there are none.
        links[stage] = _mended(folder, stage, hashes[stage], receipt) if receipt and lost else Link(receipt)
    return Chain(links)


def _mended(folder: Folder, stage: Stage, own_hash: str, receipt: Receipt) -> Link:
    """A commit with its supplements and requests."""
    supplement, request = (name(stage, own_hash, receipt.shard, 1) for name in (layout.commit, layout.retry_request))
    extras = folder.read_many([supplement, request])  # one round trip: mostly there are none
    supplements: list[Receipt] = []
    if supplement in extras:
        while found := read_commit(folder, stage, own_hash, receipt.shard, len(supplements) + 1):
            supplements.append(found)
    requests = 0
    if request in extras:
        while folder.exists(layout.retry_request(stage, own_hash, receipt.shard, requests + 1)):
            requests += 1
    return Link(receipt, tuple(supplements), requests)


@dataclass(frozen=True)
class Listing:
    """The records that one stage has, by their names alone: one listing, no record is read."""

    stage: Stage
    stage_hash: str
    committed: frozenset[int]
    supplements: Mapping[int, Sequence[int]]
    """Shard -> numbers of its supplements, in order; shards without any are absent."""
    requests: Mapping[int, int]
    """Shard -> number of its last request; shards without any are absent."""

    def read(self, folder: Folder, shards: Iterable[int]) -> dict[int, Link]:
        """Shard -> what is committed, for those of `shards` that are. Raises ShardError if a record is damaged."""
        chosen = [shard for shard in shards if shard in self.committed]
        receipts = read_commits(folder, self.stage, self.stage_hash, chosen)
        links: dict[int, Link] = {}
        for shard, receipt in receipts.items():
            numbers = self.supplements.get(shard, ())
            found = (read_commit(folder, self.stage, self.stage_hash, shard, number) for number in numbers)
            links[shard] = Link(receipt, tuple(each for each in found if each), self.requests.get(shard, 0))
        return links


def list_records(folder: Folder, stage: Stage, stage_hash: str) -> Listing:
    """The records that a stage has."""
    committed: set[int] = set()
    supplements: dict[int, list[int]] = {}
    requests: dict[int, int] = {}
    for name in folder.names(layout.commit_folder(stage, stage_hash)):
        if (shard := layout.number_of(name)) is not None:
            committed.add(shard)
        elif (extra := layout.extra_of(name)) is not None:
            shard, kind, number = extra
            if kind == "r":
                requests[shard] = max(number, requests.get(shard, 0))
            else:
                supplements.setdefault(shard, []).append(number)  # names come sorted
    return Listing(stage, stage_hash, frozenset(committed), supplements, requests)


def list_links(folder: Folder, stage: Stage, stage_hash: str) -> dict[int, Link]:
    """Shard -> what is committed of the stage, for all shards that are committed. Raises ShardError if a record is
    damaged."""
    listing = list_records(folder, stage, stage_hash)
    return listing.read(folder, sorted(listing.committed))


def read_chains(folder: Folder, hashes: Mapping[Stage, str], shards: int) -> Iterator[tuple[int, Chain]]:
    """(shard, chain) of shards 0, 1, ... in order. Records are read `CHUNK_SHARDS` at a time: memory does not grow with
    them."""
    listings = {stage: list_records(folder, stage, own_hash) for stage, own_hash in hashes.items()}
    for chunk in chunks(range(shards)):
        links = {stage: listing.read(folder, chunk) for stage, listing in listings.items()}
        for shard in chunk:
            yield shard, Chain({stage: found.get(shard, Link()) for stage, found in links.items()})


def chunks(shards: Sequence[int]) -> Iterator[Sequence[int]]:
    """`shards` in pieces whose records are read at once."""
    return (shards[start : start + CHUNK_SHARDS] for start in range(0, len(shards), CHUNK_SHARDS))
