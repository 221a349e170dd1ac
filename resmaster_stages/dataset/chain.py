"""What is committed of a shard, stage by stage, and so what is still to do in it.

A sample that failed in a stage is lost to the stages after it. Where it becomes good in a later attempt, these stages
are due again: each goes on from its own earlier attempt with the samples that it did not get then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset

CHUNK_SHARDS = 500
"""Shards whose records are read, in parallel where the store can, and held at a time."""


@dataclass(frozen=True)
class Chain:
    """The records of one shard that count."""

    receipts: Mapping[str, Receipt | None]
    """Stage -> its record, None where there is none; in pipeline order."""

    @property
    def complete(self) -> bool:
        """Whether every stage is committed."""
        return all(self.receipts.values())

    @property
    def committed(self) -> dict[str, Receipt]:
        """Stage -> its record, of the stages that have one."""
        return {stage: receipt for stage, receipt in self.receipts.items() if receipt}

    def lost(self, stage: str | None = None) -> frozenset[str]:
        """The samples that some stage before `stage` does not hold, as it or one before it lost them.

        Without `stage`: those that some stage at all does not hold.
        """
        names = list(self.receipts)
        before = names[: names.index(stage)] if stage else names
        found = [receipt for name in before if (receipt := self.receipts[name])]
        return frozenset(key for receipt in found for key in (*receipt.failed_keys, *receipt.lost_keys))

    def due(self, stage: str, number: int = 1) -> bool:
        """Whether `stage` has something to do.

        That is a first attempt, one up to `number`, or samples that it did not get before.
        """
        receipt = self.receipts[stage]
        return receipt is None or receipt.number < number or frozenset(receipt.lost_keys) != self.lost(stage)


def read_chain(
    dataset: Dataset, shard: int, last: str | None = None, known: Mapping[str, Receipt] | None = None
) -> Chain:
    """One shard's records up to the stage `last`; those that are `known` are not read.

    Raises ShardError if one is damaged.
    """
    receipts: dict[str, Receipt | None] = {}
    for stage in dataset.hashes:
        receipts[stage] = (known or {}).get(stage) or dataset.commits(stage).read(shard)
        if stage == last:
            break
    return Chain(receipts)


def read_chains(dataset: Dataset, shards: Sequence[int]) -> Iterator[tuple[int, Chain]]:
    """(shard, its records) of `shards`, in order. Raises ShardError if a record is damaged.

    Records are read `CHUNK_SHARDS` at a time: memory does not grow with them.
    """
    numbers = {stage: dataset.commits(stage).numbers() for stage in dataset.hashes}
    for chunk in chunks(shards):
        found = {
            stage: dataset.commits(stage).read_many({shard: known[shard] for shard in chunk if shard in known})
            for stage, known in numbers.items()
        }
        for shard in chunk:
            yield shard, Chain({stage: receipts.get(shard) for stage, receipts in found.items()})


def chunks(shards: Sequence[int]) -> Iterator[Sequence[int]]:
    """`shards` in pieces whose records are read at once."""
    return (shards[start : start + CHUNK_SHARDS] for start in range(0, len(shards), CHUNK_SHARDS))
