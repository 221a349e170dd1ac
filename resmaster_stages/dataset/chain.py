"""Reads the commits of a shard, stage by stage, and tells which stages are still due.

A sample that failed in a stage is lost to the stages after it. If the sample becomes good in a later attempt, those
stages are due again: each continues from its own earlier attempt, with the samples that it did not get then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset

log = logging.getLogger(__name__)

CHUNK_SHARDS = 500
"""Number of shards whose records are read and held at a time. Records are read in parallel if the store allows it."""


@dataclass(frozen=True)
class Chain:
    """The valid commit records of one shard, one per stage."""

    receipts: Mapping[str, Receipt | None]
    """Stage -> its record, or None; in pipeline order."""

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

    def due(self, stage: str, number: int = 1) -> bool:
        """Whether `stage` has something to do: it has no commit, its last attempt is below `number`, or a sample that
        its last attempt did not get is not lost upstream any more.
        """
        receipt = self.receipts[stage]
        return receipt is None or receipt.number < number or not self.lost(stage).issuperset(receipt.lost_keys)


def read_chain(
    dataset: Dataset, shard: int, last: str | None = None, known: Mapping[str, Receipt] | None = None
) -> Chain:
    """The records of one shard up to the stage `last`. Records in `known` are not read again.

    Raises ShardError if a record is damaged.
    """
    receipts: dict[str, Receipt | None] = {}
    for stage in dataset.hashes:
        receipts[stage] = (known or {}).get(stage) or dataset.commits(stage).read(shard)
        if stage == last:
            break
    return Chain(receipts)


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
                yield shard, Chain({stage: receipts.get(shard) for stage, receipts in found.items()})


def chunks(shards: Sequence[int]) -> Iterator[Sequence[int]]:
    """`shards` in pieces of `CHUNK_SHARDS`."""
    return (shards[start : start + CHUNK_SHARDS] for start in range(0, len(shards), CHUNK_SHARDS))
