"""Deletes the commit records of damaged shards that cannot be mended, so that the shards are made anew.

A commit record never changes, so damage to its objects is noted beside it (`Commits.mark`). A marked shard counts as
pending. Usually it is mended: it is computed again, and objects with the recorded sha256 are put back under their old
names (`runner.mend`). This module has the two other ways.
"""

from __future__ import annotations

from collections.abc import Collection

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError


def drop_unreadable_records(dataset: Dataset) -> dict[int, str]:
    """Delete the records of each marked shard that has an unreadable record, in that stage and all later stages.

    Unreadable records name no objects. Later stages are deleted too, because a new attempt may lose other samples. A
    mark whose shard has no record any more is removed, because the shard is made anew.
    Returns shard -> why, for each shard whose records cannot be deleted.
    """
    hindered: dict[int, str] = {}
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        marked, unreadable = commits.marked(), set()
        records, numbers = (commits.records(), commits.numbers()) if marked else ({}, {})
        for shard in marked:
            if shard not in records:
                commits.unmark(shard)
                continue
            try:
                receipts = [commits.attempt(shard, number) for number in range(1, numbers.get(shard, 0) + 1)]
                if None in receipts:  # listed, and a link to nothing
                    unreadable.add(shard)
            except ShardError:
                unreadable.add(shard)
        hindered |= _drop_from(dataset, stage, unreadable)
    return hindered


def give_up_damaged(dataset: Dataset, shards: Collection[int] | None = None) -> dict[int, str]:
    """Delete the records of damaged shards, from the damaged stage on, so that they are made anew with new bytes.

    Returns shard -> why, for each shard whose records cannot be deleted.
    """
    hindered: dict[int, str] = {}
    for stage in dataset.hashes:
        marked = dataset.commits(stage).marked()
        hindered |= _drop_from(dataset, stage, {shard for shard in marked if shards is None or shard in shards})
    return hindered


def _drop_from(dataset: Dataset, first: str, shards: Collection[int]) -> dict[int, str]:
    stages = list(dataset.hashes)
    hindered: dict[int, str] = {}
    for stage in reversed(stages[stages.index(first) :]):  # later stages first
        hindered |= dataset.commits(stage).drop(sorted(set(shards) - hindered.keys()))
    return hindered
