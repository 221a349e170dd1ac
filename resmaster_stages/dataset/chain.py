"""Reads the commits of a shard, stage by stage, and tells which stages are still due.

A sample that failed in a stage is lost to the stages after it. If the sample becomes good in a later attempt, those
stages are due again: each continues from its own earlier attempt, with the samples that it did not get then.

A sample that was asked for again (`redo`) is due in a stage whose commit holds an earlier take of the sample than was
asked for, or than a stage before holds. The sample waits until all stages before hold the take that they should. So a
stage that holds the last take that was asked for made it from the right takes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.redo import Takes, raise_to

log = logging.getLogger(__name__)

CHUNK_SHARDS = 500
"""Number of shards whose records are read and held at a time. Records are read in parallel if the store allows it."""


@dataclass(frozen=True)
class Chain:
    """The valid commit records of one shard, one per stage."""

    receipts: Mapping[str, Receipt | None]
    """Stage -> its record, or None; in pipeline order."""
    asked: Mapping[str, Takes] = field(default_factory=dict)
    """First stage -> sample -> take that was asked for from this stage on."""

    @property
    def complete(self) -> bool:
        """Whether every stage is committed."""
        return all(self.receipts.values())

    @property
    def committed(self) -> dict[str, Receipt]:
        """Stage -> its record, for the stages that have one."""
        return {stage: receipt for stage, receipt in self.receipts.items() if receipt}

    def lost(self, stage: str | None = None) -> frozenset[str]:
        """The samples that failed in a stage before `stage`, or that such a stage did not get.

        Without `stage`: the same for all stages.
        """
        names = list(self.receipts)
        before = names[: names.index(stage)] if stage else names
        found = [receipt for name in before if (receipt := self.receipts[name])]
        return frozenset(key for receipt in found for key in (*receipt.failed_keys, *receipt.lost_keys))

    def takes(self, stage: str, ahead: Collection[str] = ()) -> dict[str, int]:
        """Sample -> the take that an attempt at `stage` makes or keeps now. Samples of take 0 are absent.

        ahead: stages that will be done before `stage`, so that no sample waits for them.
        """
        wanted: dict[str, int] = {}
        waiting: set[str] = set()
        for name, receipt in self.receipts.items():
            raise_to(wanted, self.asked.get(name, {}))
            made = receipt.takes if receipt else {}
            if name == stage:
                takes = dict(made)
                raise_to(takes, {key: take for key, take in wanted.items() if key not in waiting})
                return takes
            raise_to(wanted, made)
            if name not in ahead:
                gone = self.lost(name).intersection(receipt.lost_keys) if receipt else frozenset()
                waiting |= {key for key, take in wanted.items() if made.get(key, 0) < take} - gone
        raise KeyError(stage)

    def redone(self, stage: str, ahead: Collection[str] = ()) -> frozenset[str]:
        """The samples of which the commit of `stage` holds an earlier take than it should. ahead: as for `takes`."""
        receipt = self.receipts[stage]
        if receipt is None:
            return frozenset()
        gone = self.lost(stage).intersection(receipt.lost_keys)
        takes = self.takes(stage, ahead)
        return frozenset(key for key, take in takes.items() if receipt.takes.get(key, 0) < take) - gone

    def made(self) -> dict[str, int]:
        """Sample -> the highest take that a stage holds. Samples of take 0 are absent."""
        takes: dict[str, int] = {}
        for receipt in self.committed.values():
            raise_to(takes, receipt.takes)
        return takes

    def known(self) -> dict[str, int]:
        """Sample -> the highest take that a stage holds or that was asked for. Samples of take 0 are absent."""
        takes = self.made()
        for asked in self.asked.values():
            raise_to(takes, asked)
        return takes

    def unfinished(self) -> frozenset[str]:
        """The samples that a stage has lost, or holds in an earlier take than a stage before it."""
        behind: set[str] = set()
        takes: dict[str, int] = {}
        for receipt in self.committed.values():
            behind |= {key for key, take in takes.items() if receipt.takes.get(key, 0) < take}
            raise_to(takes, receipt.takes)
        return self.lost() | behind

    def due(self, stage: str, number: int = 1, ahead: Collection[str] = ()) -> bool:
        """Whether `stage` has something to do: it has no commit, its last attempt is below `number`, a sample that its
        last attempt did not get is not lost upstream any more, or a sample is to be made again.

        ahead: as for `takes`.
        """
        receipt = self.receipts[stage]
        if receipt is None or receipt.number < number or not self.lost(stage).issuperset(receipt.lost_keys):
            return True
        return bool(self.redone(stage, ahead))


def read_chain(
    dataset: Dataset,
    shard: int,
    last: str | None = None,
    known: Mapping[str, Receipt] | None = None,
    redone: bool = True,
) -> Chain:
    """The records of one shard up to the stage `last`. Records in `known` are not read again.

    redone: whether samples may have been made again. Raises ShardError if a record is damaged.
    """
    receipts: dict[str, Receipt | None] = {}
    for stage in dataset.hashes:
        receipts[stage] = (known or {}).get(stage) or dataset.commits(stage).read(shard, redone)
        if stage == last:
            break
    return Chain(receipts, _asked(dataset, shard))


def read_chains(dataset: Dataset, shards: Sequence[int]) -> Iterator[tuple[int, Chain]]:
    """Yield (shard, its records) for `shards`, in order. Shards with a damaged record are left out, with a warning.

    Records are read for `CHUNK_SHARDS` shards at a time, so memory does not grow with their number. Raises PlanError if
    there are commits of shards that are not planned.
    """
    numbers = {stage: dataset.commits(stage).numbers() for stage in dataset.hashes}
    dataset.plan.require(max((shard + 1 for known in numbers.values() for shard in known), default=0))
    for chunk in chunks(shards):
        found: dict[str, dict[int, Receipt]] = {}
        damaged: dict[int, str] = {}
        for stage, known in numbers.items():
            some = {shard: known[shard] for shard in chunk if shard in known}
            found[stage], problems = dataset.commits(stage).read_some(some)
            damaged.update(problems)
        for shard in chunk:
            if shard in damaged:
                log.warning("left out: shard %06d: %s", shard, damaged[shard])
            else:
                receipts = {stage: records.get(shard) for stage, records in found.items()}
                yield shard, Chain(receipts, _asked(dataset, shard))


def redo_left(dataset: Dataset) -> dict[str, dict[int, int]]:
    """Stage -> shard -> number of its samples that are still to be made again. Shards without such samples are absent.

    Shards without commit do not count, because whatever is made there is new.
    """
    left: dict[str, dict[int, int]] = {stage: {} for stage in dataset.hashes}
    shards = [shard for shard in sorted(dataset.redos.shards) if shard < dataset.plan.shards]
    for shard, chain in read_chains(dataset, shards) if shards else ():
        for stage in dataset.hashes:
            if samples := len(chain.redone(stage, ahead=dataset.hashes)):
                left[stage][shard] = samples
    return left


def _asked(dataset: Dataset, shard: int) -> dict[str, Takes]:
    """First stage -> sample of the shard -> take that was asked for from this stage on."""
    asked = dataset.redos.asked(shard)
    if not asked:
        return {}
    planned = set(dataset.plan.keys_of(shard))
    return {stage: {key: take for key, take in takes.items() if key in planned} for stage, takes in asked.items()}


def chunks(shards: Sequence[int]) -> Iterator[Sequence[int]]:
    """`shards` in pieces of `CHUNK_SHARDS`."""
    return (shards[start : start + CHUNK_SHARDS] for start in range(0, len(shards), CHUNK_SHARDS))
