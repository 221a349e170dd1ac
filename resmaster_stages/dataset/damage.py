"""Marks of damage: which objects of which committed shards are known to be gone or changed. Knows nothing about how to
mend them.

A commit record is the truth and never changes, so damage to what it names is noted beside it, in `damaged/`. A marked
shard counts as pending: it is made again, and what comes out with the recorded sha256 is put back under its old name.

Invariant: a mark is taken away only by whoever found every object as recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import read_commit
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder


def mark(folder: Folder, stage: Stage, stage_hash: str, shard: int, objects: Sequence[str]) -> None:
    """Note that these objects of a committed shard are damaged; replaces an earlier note."""
    text = json.dumps({"objects": sorted(objects)}, indent=1) + "\n"
    folder.write(layout.damage(stage, stage_hash, shard), text.encode())


def unmark(folder: Folder, stage: Stage, stage_hash: str, shard: int) -> None:
    """The shard is whole again."""
    folder.remove(layout.damage(stage, stage_hash, shard))


def is_marked(folder: Folder, stage: Stage, stage_hash: str, shard: int) -> bool:
    """Whether damage is known."""
    try:
        folder.read(layout.damage(stage, stage_hash, shard))
    except FileNotFoundError:
        return False
    return True


def marked_shards(folder: Folder, stage: Stage, stage_hash: str) -> list[int]:
    """The shards of which damage is known, from one listing."""
    names = folder.names(layout.damage_folder(stage, stage_hash))
    return sorted(shard for name in names if (shard := layout.number_of(name)) is not None)


def drop_unreadable_records(dataset: Dataset) -> None:
    """Delete the commit records of marked shards that cannot be read, and what was made from them: they name nothing
    any more.

    Later stages go too, because another attempt may lose other samples.
    """
    for stage, own_hash in stage_hashes(dataset.config).items():
        marked = set(marked_shards(dataset.folder, stage, own_hash))
        names = dataset.folder.names(layout.commit_folder(stage, own_hash)) if marked else []
        lost = set()
        for name in names:
            shard, extra = layout.shard_of(name), layout.extra_of(name)
            if layout.is_commit(name) and shard in marked:
                try:
                    read_commit(dataset.folder, stage, own_hash, shard, extra[2] if extra else 0)
                except ShardError:
                    lost.add(shard)
        _drop_commits(dataset, stage, lost)


def give_up_damaged(dataset: Dataset, shards: Sequence[int] | None = None) -> None:
    """Delete the commit records of damaged shards, from the damaged stage on: they will be made anew, with new
    bytes."""
    for stage, own_hash in stage_hashes(dataset.config).items():
        marked = marked_shards(dataset.folder, stage, own_hash)
        _drop_commits(dataset, stage, {shard for shard in marked if shards is None or shard in shards})


def _drop_commits(dataset: Dataset, first: Stage, shards: set[int]) -> None:
    """Delete commit records, supplements, requests and marks of `shards` in the stage `first` and all after it."""
    hashes = stage_hashes(dataset.config)
    stages = list(hashes)[list(hashes).index(first) :] if shards else []
    for stage in reversed(stages):  # what was made from it goes first
        # Reversed, a shard's supplements and requests go before its commit.
        for name in reversed(dataset.folder.names(layout.commit_folder(stage, hashes[stage]))):
            if layout.shard_of(name) in shards:
                dataset.folder.remove(name)
        for shard in shards:
            unmark(dataset.folder, stage, hashes[stage], shard)
