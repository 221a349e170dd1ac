"""Marks of damage: which objects of which committed shards are known to be gone or changed. Knows nothing about how to mend them.

A commit record is the truth and never changes, so damage to what it names is noted beside it, in `damaged/`. A marked shard
counts as pending: it is made again, and what comes out with the recorded sha256 is put back under its old name.

Invariant: a mark is taken away only by whoever found every object as recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from resmaster_stages.config import Stage
from resmaster_stages.storage import layout
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
