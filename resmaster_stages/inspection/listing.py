"""Tells what the names of a dataset's files say of its shards. Reads no record, and lists each folder once.

A dataset with thousands of shards costs one request per thousand names, and folders that are not there cost none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import numbers_of
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.layout import FailedName
from resmaster_stages.storage.filesystem import Listed


@dataclass(frozen=True)
class StageListing:
    """What names say of one stage under the current configuration."""

    stage: str
    records: dict[int, Listed]
    """Committed shard -> the record that counts."""
    numbers: dict[int, int]
    """Committed shard -> number of the attempt that counts."""
    marked: frozenset[int] = frozenset()
    """Committed shards that are marked as damaged."""
    attempts: tuple[FailedName, ...] = ()
    """Attempts at a shard that ended by an error."""
    ledgers: dict[int, list[Listed]] = field(default_factory=dict)
    """Shard -> its ledger files, of any configuration."""


def list_stages(dataset: Dataset, present: Collection[str]) -> list[StageListing]:
    """The stages of a dataset in order. present: the names directly in the dataset's folder."""
    found = {
        folder: _by_folder(dataset.folder.files(folder, whatever=True) if folder in present else ())
        for folder in (layout.COMMITS, layout.DAMAGED, layout.ATTEMPTS, layout.ERRORS)
    }
    return [_listing(stage, stage_hash, found) for stage, stage_hash in dataset.hashes.items()]


def _by_folder(files: Iterable[Listed]) -> dict[str, list[Listed]]:
    folders: dict[str, list[Listed]] = {}
    for file in files:
        folders.setdefault(file.name.rpartition("/")[0], []).append(file)
    return folders


def _listing(stage: str, stage_hash: str, found: dict[str, dict[str, list[Listed]]]) -> StageListing:
    records = {file.name: file for file in found[layout.COMMITS].get(layout.commit_folder(stage, stage_hash), ())}
    numbers = numbers_of(records)
    marks = _names(found[layout.DAMAGED].get(layout.damage_folder(stage, stage_hash), ()))
    attempts = _names(found[layout.ATTEMPTS].get(layout.attempts_folder(stage, stage_hash), ()))
    ledgers: dict[int, list[Listed]] = {}
    for file in found[layout.ERRORS].get(layout.ledger_folder(stage), ()):
        if (shard := layout.ledger_shard(file.name)) is not None:
            ledgers.setdefault(shard, []).append(file)
    return StageListing(
        stage,
        {shard: records[layout.commit(stage, stage_hash, shard, number)] for shard, number in numbers.items()},
        numbers,
        frozenset(shard for name in marks if (shard := layout.number_of(name)) is not None),
        tuple(sorted(each for name in attempts if (each := layout.failed_attempt_of(name)))),
        ledgers,
    )


def _names(files: Iterable[Listed]) -> Iterator[str]:
    return (file.name for file in files)
