"""The keys that are never planned, whatever the prompts or images are, as `run --exclude` was told.

Without these records, the next run that reads the same input would plan what was left out.

Invariants:
- A record is created by exactly one writer and never changed. Each adds keys to those before.
- A sample that is planned stays planned. For its key, these records have no effect.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pydantic import ConfigDict, PositiveInt, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import PlanError
from resmaster_stages.storage.filesystem import Folder


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Exclusion:
    """The content of a record."""

    number: PositiveInt
    source: str
    """Name of the list that gave the keys."""
    keys: tuple[str, ...]


def exclusion_names(folder: Folder) -> list[str]:
    """The names of all records, readable or not, in order."""
    return sorted(name for name in folder.names(layout.EXCLUDED) if layout.number_of(name) is not None)


def parse_exclusion(name: str, data: bytes) -> Exclusion:
    """The content of a record. Raises ValueError if the record is damaged."""
    found = parse_record(Exclusion, data)
    if layout.excluded(found.number) != name:
        raise ValueError("its number contradicts its name")
    return found


def read_exclusions(folder: Folder) -> dict[str, str]:
    """Key -> name of the list that gave it, for all keys that are never planned. Raises PlanError for damage."""
    names = exclusion_names(folder)
    found = folder.read_many(names, lenient=True)
    excluded: dict[str, str] = {}
    for name in names:
        try:
            record = parse_exclusion(name, found.get(name, b""))
        except ValueError as error:
            raise PlanError(
                f"{folder.url_of(name)}: damaged ({error}); restore it from a copy, or delete it, and exclude its "
                "samples again: resmaster run CONFIG --exclude KEYS"
            ) from error
        excluded |= {key: excluded.get(key, record.source) for key in record.keys}
    return excluded


def exclude(folder: Folder, keys: Collection[str], source: str) -> None:
    """Add `keys` to those that are never planned. Does nothing if all of them are there already."""
    while new := sorted(set(keys) - read_exclusions(folder).keys()):
        numbers = [layout.number_of(name) or 0 for name in exclusion_names(folder)]
        record = Exclusion(max(numbers, default=0) + 1, source, tuple(new))
        try:
            folder.create(layout.excluded(record.number), record_text(record))
        except FileExistsError:
            continue  # by another process, or by this one if the store's answer was lost
