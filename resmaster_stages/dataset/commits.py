"""The commit records of one stage under one configuration, and the damage marks beside them.

The protocol: produce locally, validate, upload under attempt-unique names, then ONE conditional create of the record.
Readers follow records and ignore every object that no record names.

A record `000123.json` makes a shard's first attempt visible. A later attempt, at failed samples or at samples that are
made again with a new seed, starts from the outputs of the first one, and becomes visible by a record of its own,
`000123.2.json`. The highest number counts.

Invariants:
- A record is created by exactly one writer and never changed. It names all its objects with sha256 and size.
- Numbers have no gaps, so of two writers that continue the same attempt, one wins.
- A loser deletes only its own objects, which no record names. While the winner is unknown, nothing is deleted.
- A damage mark is removed only when every object is as recorded again, or together with the shard's records.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, describe, discard
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import ResMasterError, ShardError, UserError
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.store_errors import is_damage


@dataclass(frozen=True)
class Commits:
    """The commits of one stage under one configuration."""

    folder: Folder
    stage: str
    stage_hash: str

    def read(self, shard: int, redone: bool = True) -> Receipt | None:
        """The record of the last attempt, which counts, or None. Raises ShardError if it is damaged.

        redone: whether samples may have been made again. If not, there is a later attempt only where samples failed or
        were lost, so that one read is mostly enough.
        """
        receipt = self.attempt(shard, 1)
        while receipt and (redone or receipt.failed_keys or receipt.lost_keys):
            later = self.attempt(shard, receipt.number + 1)
            if later is None:
                break
            receipt = later
        return receipt

    def attempt(self, shard: int, number: int) -> Receipt | None:
        """The record of one attempt, or None. Raises ShardError if it is damaged."""
        name = self._name(shard, number)
        try:
            return self._parsed(name, self.folder.read(name))
        except FileNotFoundError:
            return None
        except (OSError, UserError) as error:
            if is_damage(error):
                raise self._damaged(name, error) from error
            raise

    def numbers(self) -> dict[int, int]:
        """Shard -> number of the attempt that counts, for all committed shards, from one listing.

        Later attempts do not count if the record of an earlier one is gone.
        """
        return numbers_of(self.folder.names(layout.commit_folder(self.stage, self.stage_hash)))

    def read_many(self, numbers: Mapping[int, int]) -> dict[int, Receipt]:
        """Shard -> record of its attempt in `numbers`. Missing records are absent. Raises ShardError for damage."""
        names = [self._name(shard, number) for shard, number in numbers.items()]
        found = (self._parsed(name, data) for name, data in self.folder.read_many(names).items())
        return {receipt.shard: receipt for receipt in found}

    def read_some(self, numbers: Mapping[int, int]) -> tuple[dict[int, Receipt], dict[int, str]]:
        """Shard -> record of its attempt in `numbers`, and shard -> why that record cannot be read, in one line."""
        found = self.folder.read_many([self._name(*place) for place in numbers.items()], lenient=True)
        receipts: dict[int, Receipt] = {}
        problems: dict[int, str] = {}
        for shard, number in numbers.items():
            name = self._name(shard, number)
            try:
                receipt = self._parsed(name, found[name]) if name in found else self.attempt(shard, number)
                if receipt is None:  # a link to nothing
                    raise self._damaged(name, "there is nothing to read")
                receipts[shard] = receipt
            except ResMasterError as error:
                problems[shard] = str(error)
        return receipts, problems

    def read_all(self) -> dict[int, Receipt]:
        """Shard -> the record that counts, for all committed shards. Raises ShardError if one is damaged."""
        return self.read_many(self.numbers())

    def create(self, receipt: Receipt, files: Sequence[tuple[str, Path]], ledger: bytes | None = None) -> Receipt:
        """Upload `files` (name in the dataset, validated local file) and make them visible by `receipt`.

        ledger: content of this attempt's error ledger, if samples failed.
        Returns the receipt that counts: this one, or that of a faster writer.
        """
        stored = tuple(describe(name, path) for name, path in files)
        ledger_name = layout.ledger(self.stage, receipt.shard, receipt.attempt) if ledger is not None else None
        receipt = replace(receipt, objects=stored, ledger=ledger_name)
        own = [name for name, _ in files] + ([ledger_name] if ledger_name else [])
        try:
            if ledger is not None and ledger_name:
                self.folder.write(ledger_name, ledger)
            for name, path in files:
                self.folder.upload(name, path)
        except Exception:
            discard(self.folder, own)
            raise
        name = self._name(receipt.shard, receipt.number)
        try:
            self.folder.create(name, record_text(receipt))
        except FileExistsError as error:
            winner = self.attempt(receipt.shard, receipt.number)
            if winner is None:
                raise ShardError(
                    f"{self.folder.url_of(name)}: was there and is gone; run the same command again"
                ) from error
            if winner.attempt != receipt.attempt:
                discard(self.folder, own)
            return winner
        except Exception:
            # The store may have stored the record although its answer was lost.
            winner = self.attempt(receipt.shard, receipt.number)
            if winner is None or winner.attempt != receipt.attempt:
                raise
            return winner
        return receipt

    def records(self) -> dict[int, list[str]]:
        """Shard -> the names of all its records, readable or not, in the order of their attempts."""
        names = self.folder.names(layout.commit_folder(self.stage, self.stage_hash))
        found: dict[int, list[str]] = {}
        for place, name in sorted((place, name) for name in names if (place := layout.attempt_of(name))):
            found.setdefault(place[0], []).append(name)
        return found

    def drop(self, shards: Collection[int]) -> dict[int, str]:
        """Delete the records and damage marks of these shards, so that they are made anew.

        Returns shard -> why, for each shard of which a record cannot be deleted.
        """
        hindered: dict[int, str] = {}
        records = self.records() if shards else {}
        for shard in shards:
            try:
                for name in reversed(records.get(shard, [])):  # later attempts first
                    self.folder.remove(name)
                self.unmark(shard)
            except UserError as error:
                hindered[shard] = str(error)
        return hindered

    def mark(self, shard: int, objects: Iterable[str]) -> None:
        """Mark these objects of a committed shard as damaged. Replaces an earlier mark."""
        text = json.dumps({"objects": sorted(objects)}, indent=1) + "\n"
        self.folder.write(layout.damage(self.stage, self.stage_hash, shard), text.encode())

    def unmark(self, shard: int) -> None:
        """Remove the damage mark of a shard."""
        self.folder.remove(layout.damage(self.stage, self.stage_hash, shard))

    def is_marked(self, shard: int) -> bool:
        """Whether the shard is marked as damaged."""
        try:
            # Reading takes one request; `exists` takes two on S3.
            self.folder.read(layout.damage(self.stage, self.stage_hash, shard))
        except FileNotFoundError:
            return False
        return True

    def marked(self) -> list[int]:
        """The shards that are marked as damaged, from one listing."""
        names = self.folder.names(layout.damage_folder(self.stage, self.stage_hash))
        return sorted(shard for name in names if (shard := layout.number_of(name)) is not None)

    def _name(self, shard: int, number: int) -> str:
        return layout.commit(self.stage, self.stage_hash, shard, number)

    def _parsed(self, name: str, data: bytes) -> Receipt:
        try:
            receipt = parse_record(Receipt, data)
        except ValueError as error:
            raise self._damaged(name, error) from error
        own = (receipt.stage, receipt.stage_hash) == (self.stage, self.stage_hash)
        if not own or name != self._name(receipt.shard, receipt.number):
            raise self._damaged(name, "it belongs to another shard, stage or configuration")
        return receipt

    def _damaged(self, name: str, error: object) -> ShardError:
        url = quoted(self.folder.url)
        return ShardError(
            f"{self.folder.url_of(name)}: damaged commit record ({error}); run: resmaster verify {url}, "
            f"then: resmaster repair {url}"
        )


def numbers_of(names: Iterable[str]) -> dict[int, int]:
    """Shard -> number of the attempt that counts, from the names of the records of one stage and configuration."""
    numbers: dict[int, int] = {}
    for shard, number in sorted(filter(None, map(layout.attempt_of, names))):
        if number == numbers.get(shard, 0) + 1:
            numbers[shard] = number
    return numbers


@dataclass(frozen=True)
class Record:
    """A commit record as it is stored in a dataset."""

    name: str
    receipt: Receipt | None
    """The record's content; None if it cannot be read."""
    successor: str | None
    """Name of the record of the next attempt, or None. If there is one, readers do not use this record's objects."""


def all_records(folder: Folder) -> Iterator[Record]:
    """Every commit record in a dataset, of every attempt and configuration."""
    for group in folder.names(layout.COMMITS):
        places = {place: name for name in folder.names(group) if (place := layout.attempt_of(name))}
        later = {name: places.get((shard, number + 1)) for (shard, number), name in places.items()}
        names = list(later)
        for start in range(0, len(names), 1000):
            chunk = names[start : start + 1000]
            found = folder.read_many(chunk, lenient=True)
            for name in sorted(chunk):
                try:
                    receipt = parse_record(Receipt, found.get(name, b""))
                    good = layout.commit(receipt.stage, receipt.stage_hash, receipt.shard, receipt.number) == name
                except ValueError:
                    good = False
                yield Record(name, receipt if good else None, later[name])
