"""Gives up what cannot be mended: deletes commit records, so that their shards are made anew.

A commit record never changes, so damage to what it names is noted beside it (`Commits.mark`). A marked shard counts as
pending: it is made again, and what comes out with the recorded sha256 is put back under its old name. These are the
other two ways out.
"""

from __future__ import annotations

from collections.abc import Collection

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ShardError


def drop_unreadable_records(dataset: Dataset) -> None:
    """Delete the records of marked shards where one cannot be read, and what was made from them.

    They name nothing any more. Later stages go too, because another attempt may lose other samples.
    """
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        marked, unreadable = commits.marked(), set()
        numbers = commits.numbers() if marked else {}
        for shard in marked:
            try:
                for number in range(1, numbers.get(shard, 0) + 1):
                    commits.attempt(shard, number)
            except ShardError:
                unreadable.add(shard)
        _drop_from(dataset, stage, unreadable)


def give_up_damaged(dataset: Dataset, shards: Collection[int] | None = None) -> None:
    """Delete the records of damaged shards, from the damaged stage on: they will be made anew, with new bytes."""
    for stage in dataset.hashes:
        marked = dataset.commits(stage).marked()
        _drop_from(dataset, stage, {shard for shard in marked if shards is None or shard in shards})


def _drop_from(dataset: Dataset, first: str, shards: set[int]) -> None:
    stages = list(dataset.hashes)
    for stage in reversed(stages[stages.index(first) :] if shards else []):  # what was made from it goes first
        dataset.commits(stage).drop(shards)
