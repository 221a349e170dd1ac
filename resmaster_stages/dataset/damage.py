"""Deletes the commit records of damaged shards that cannot be mended, so that the shards are made anew.

A commit record never changes, so damage to its objects is noted beside it (`Commits.mark`). A marked shard counts as
pending. Usually it is mended: it is computed again, and objects with the recorded sha256 are put back under their old
names (`runner.mend`). This module has the two other ways.
"""

from __future__ import annotations

from collections.abc import Collection

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError


def drop_unreadable_records(dataset: Dataset) -> None:
    """Delete the records of each marked shard that has an unreadable record, in that stage and all later stages.

    Unreadable records name no objects. Later stages are deleted too, because a new attempt may lose other samples.
    """
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        marked, unreadable = commits.marked(), set()
        numbers = commits.numbers() if marked else {}
        for shard in marked:
            try:
                receipts = [commits.attempt(shard, number) for number in range(1, numbers.get(shard, 0) + 1)]
                if None in receipts:  # listed, and a link to nothing
                    unreadable.add(shard)
            except ShardError:
                unreadable.add(shard)
        _drop_from(dataset, stage, unreadable)


def give_up_damaged(dataset: Dataset, shards: Collection[int] | None = None) -> None:
    """Delete the records of damaged shards, from the damaged stage on, so that they are made anew with new bytes."""
    for stage in dataset.hashes:
        marked = dataset.commits(stage).marked()
        _drop_from(dataset, stage, {shard for shard in marked if shards is None or shard in shards})


def _drop_from(dataset: Dataset, first: str, shards: set[int]) -> None:
    stages = list(dataset.hashes)
    for stage in reversed(stages[stages.index(first) :] if shards else []):  # later stages first
        dataset.commits(stage).drop(shards)
