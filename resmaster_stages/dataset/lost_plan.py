"""Finds records of the plan that are lost or damaged, and makes them again from the plan's files.

The last file of a generation holds what the record says of the others. So the record can be made again if all files of
the generation are there, are whole, and fit the commits. The new record is equal to the lost one.

A generation without a record is no loss by itself: a planner may be at work, or was killed. It is lost if a later
generation has a record, or if commits are of shards that no readable record plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import described, difference
from resmaster_stages.dataset.plan import (
    Generation,
    Plan,
    check_numbers,
    committed_shards,
    contradicted,
    last_generation,
    part_of,
    read_generation,
)
from resmaster_stages.dataset.records import parse_values, record_text
from resmaster_stages.dataset.schemas import PLAN_SCHEMA
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.keys import digest
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.store_errors import is_damage
from resmaster_stages.storage.tables import decode_table, facts_of

PLAN_GONE = "restore the folder plan/ from a copy; without one see: when the plan is lost, in docs/storage.md"
"""What to do where the plan's files do not tell what a record said."""


@dataclass(frozen=True)
class LostRecord:
    """A record of the plan that is gone or cannot be read."""

    name: str
    what: Literal["gone", "unreadable"]
    generation: Generation | None
    """What the record said, from the files of its generation; None if these do not tell."""


def survey(folder: Folder) -> tuple[Plan, list[LostRecord]]:
    """The plan as far as it is known, with what lost records said, and the lost records.

    After a record that cannot be made again, nothing more is known of the plan.
    """
    known: list[Generation] = []
    lost: list[LostRecord] = []
    last, committed = last_generation(folder), committed_shards(folder)
    while True:
        what: Literal["gone", "unreadable"] = "gone"
        try:
            found = read_generation(folder, known)
        except (ValueError, OSError, UserError) as error:
            if not isinstance(error, ValueError) and not is_damage(error):
                raise
            found, what = None, "unreadable"
        if found is None:
            planned = sum(generation.shards for generation in known)
            if what == "gone" and len(known) > last and planned >= committed:
                return Plan(folder, tuple(known)), lost
            found = _made_again(folder, known)
            lost.append(LostRecord(layout.plan_record(len(known)), what, found))
        if found is None:
            return Plan(folder, tuple(known)), lost
        known.append(found)


def restore_plan(folder: Folder) -> list[str]:
    """Write every lost record of the plan again. Returns their names.

    Raises PlanError if one cannot be made again, and UserError if what stands in the place of one cannot be removed.
    """
    written = []
    for record in survey(folder)[1]:
        if record.generation is None:
            raise PlanError(f"{folder.url_of(record.name)}: {record.what}, and cannot be made again; {PLAN_GONE}")
        if record.name in folder.names(record.name.rpartition("/")[0]):  # unreadable, or a link to nothing
            folder.remove(record.name)
        folder.create(record.name, record_text(record.generation))
        written.append(record.name)
    return written


def _made_again(folder: Folder, before: Sequence[Generation]) -> Generation | None:
    """The generation after `before`, from its files. None if they are not whole, or do not tell which one it was."""
    found = []
    for generation in _candidates(folder, before):
        plan = Plan(folder, (*before, generation))
        whole = all(difference(folder, stored) is None for stored in generation.objects)
        if whole and contradicted(plan, generation.first_shard) is None:
            found.append(generation)
    return found[0] if len(found) == 1 else None


def _candidates(folder: Folder, before: Sequence[Generation]) -> Iterator[Generation]:
    """What the whole files in the folder of the generation after `before` say of it: one planner's word for each."""
    names = [name for name in folder.names(layout.generation(len(before))) if layout.is_plan_part(name)]
    for name in names:
        data = folder.read_many([name], lenient=True).get(name, b"")
        try:
            rows = decode_table(data, PLAN_SCHEMA, name).to_pylist()
            facts = facts_of(data, name)
            if "generation" not in facts or facts.get("rows_sha256") != digest(rows):
                continue
            generation = parse_values(Generation, facts["generation"].encode())
            generation = replace(generation, parts=(*generation.parts, part_of(described(name, data), rows)))
            check_numbers(generation, before)
        except (ValueError, ShardError):
            continue
        yield generation
