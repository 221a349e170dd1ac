"""Further attempts at failed samples of committed shards: the stages, shards and attempt numbers that are asked for."""

from __future__ import annotations

from collections.abc import Collection

from resmaster_stages.dataset.chain import read_chains
from resmaster_stages.dataset.dataset import Dataset

Retries = dict[str, dict[str, int]]
"""Stage -> shard (its number as text, for JSON) -> number of the attempt that is asked for.

A request is fulfilled once the shard has an attempt of that number, whichever run made it.
"""


def retries_of(
    dataset: Dataset, shards: Collection[int] | None = None, stages: Collection[str] | None = None
) -> tuple[Retries, int]:
    """The next attempt for every committed shard with failed samples, and the number of those samples.

    Only for `shards` and `stages` (default: all).
    """
    retries: Retries = {}
    samples = 0
    for shard, chain in read_chains(dataset, range(dataset.plan.shards)):
        if shards is not None and shard not in shards:
            continue
        for stage, receipt in chain.receipts.items():
            if receipt and receipt.failed_keys and (stages is None or stage in stages):
                retries.setdefault(stage, {})[str(shard)] = receipt.number + 1
                samples += len(receipt.failed_keys)
    return retries, samples


def part_of(retries: Retries | None, shards: Collection[int]) -> Retries | None:
    """The part of `retries` for some shards."""
    if retries is None:
        return None
    return {
        stage: {shard: number for shard, number in numbers.items() if int(shard) in shards}
        for stage, numbers in retries.items()
    }


def number_of(retries: Retries | None, stage: str, shard: int) -> int:
    """The number up to which a stage of a shard is to be attempted; 1 if nothing is asked for."""
    return (retries or {}).get(stage, {}).get(str(shard), 1)
