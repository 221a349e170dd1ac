"""Keeps what was read of records, ledgers and tables, so that a second look at a dataset reads only what is new.

A file that is listed with another size or time is read again. What cannot be read is not kept. Threads may share it if
each looks at a dataset of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from resmaster_stages.dataset.chain import chunks
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.ledger import read_ledgers
from resmaster_stages.inspection.listing import StageListing
from resmaster_stages.storage.filesystem import Listed

Value = TypeVar("Value")


class Made(NamedTuple):
    """What the commit of a shard adds to the numbers of its stage."""

    samples_ok: int
    samples_failed: int
    seconds: float
    finished: float
    """Unix time."""
    gpu: str
    """"" if it was not made on a GPU."""
    native_rows: float
    """UNet evaluations, in native views."""
    bytes: int


class Failure(NamedTuple):
    """A row of a ledger."""

    shard: int
    key: str
    error_class: str
    attempt_number: int


class Known:
    """What was read so far, of any number of datasets."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str, str], dict[int, tuple[Listed, Made]]] = {}
        self._ledgers: dict[tuple[str, str, str], dict[str, tuple[Listed, tuple[Failure, ...]]]] = {}
        self._values: dict[tuple[str, str], tuple[Hashable, Any]] = {}

    def made(
        self, commits: Commits, listing: StageListing, shards: Sequence[int]
    ) -> tuple[dict[int, Made], dict[int, str]]:
        """Shard -> what its commit made, and shard -> why its record cannot be read."""
        known = self._records.setdefault(_place(commits), {})
        for shard in [each for each in known if listing.records.get(each) != known[each][0]]:
            del known[shard]
        problems: dict[int, str] = {}
        for chunk in chunks([shard for shard in shards if shard not in known]):
            receipts, found = commits.read_some({shard: listing.numbers[shard] for shard in chunk})
            problems.update(found)
            known.update({shard: (listing.records[shard], _made(receipt)) for shard, receipt in receipts.items()})
        return {shard: known[shard][1] for shard in shards if shard in known}, problems

    def failures(self, commits: Commits, files: Sequence[Listed]) -> list[Failure]:
        """The rows of ledger files that are of the stage under its configuration."""
        known = self._ledgers.setdefault(_place(commits), {})
        fresh = {file.name: file for file in files if known.get(file.name, (None,))[0] != file}
        for name, rows in read_ledgers(commits, list(fresh)).items():
            known[name] = fresh[name], tuple(map(_failure, rows))
        return [row for file in files if file.name in known for row in known[file.name][1]]

    def value(self, url: str, name: str, version: Hashable, make: Callable[[], Value]) -> Value:
        """The value `name` of the dataset at `url`, made again if `version` differs from that of the last time."""
        known = self._values.get((url, name))
        if known is None or known[0] != version:
            self._values[url, name] = known = version, make()
        value: Value = known[1]
        return value


def _place(commits: Commits) -> tuple[str, str, str]:
    return commits.folder.url, commits.stage, commits.stage_hash


def _made(receipt: Receipt) -> Made:
    facts = receipt.provenance
    return Made(
        receipt.samples_ok,
        receipt.samples_failed,
        receipt.seconds,
        datetime.fromisoformat(receipt.finished_at).timestamp(),
        str(facts.get("gpu", "")),
        facts.get("unet", {}).get("native_rows", 0.0),
        sum(stored.bytes for stored in receipt.objects),
    )


def _failure(row: Mapping[str, Any]) -> Failure:
    return Failure(row["shard"], row["key"], row["error_class"], row["attempt_number"])
