"""The plan of a dataset: its samples, their shards and their order. Reads and appends generations of the plan.

This module does not read prompts or images.

Invariants:
- A generation is immutable once its `_PLAN.json` exists. Of racing planners, exactly one writes that file.
- New samples append a generation with new shards. Samples never move: the last shard of a generation may stay partial.
- Shard numbers and indices are dense from 0. A key occurs once.
- Where commits are there already, because a plan was lost, only a generation that fits them becomes valid.
- The last file of a generation holds all that its record says, so that a lost record can be made again (`lost_plan`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject, described, discard, new_attempt
from resmaster_stages.dataset.commits import all_records
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.dataset.schemas import DUPLICATES_SCHEMA, PLAN_SCHEMA, REJECTED_SCHEMA
from resmaster_stages.errors import PlanError
from resmaster_stages.keys import canonical_json, digest, digest_of_keys, prompt_key
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.tables import TableWriter, decode_table, encode_table

if TYPE_CHECKING:
    from resmaster_stages.dataset.sample import Sample

PART_ROWS = 50_000
"""Samples per plan file, rounded to whole shards."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """A sample to be made: its key and its inputs. `height` and `width` are in low-res px."""

    key: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    replica: int
    source: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedSample(SampleSpec):
    """A sample with its shard and its index in the whole dataset."""

    shard: int = 0
    index: int = 0


@dataclass(frozen=True)
class Rejected:
    """An input that cannot become a sample."""

    source: str
    """File and line, or image."""
    text: str
    """The beginning of its text."""
    reason: str

    def __str__(self) -> str:
        shown = f" {self.text!r}" if self.text else ""
        return f"{self.source}: {self.reason}{shown}"


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An input that equals an earlier input, so both have one sample."""

    source: str
    """File and line, or image."""
    key: str
    """Key of the sample (of replica 0)."""
    first: str | None = None
    """The earlier image; None for prompts."""

    def __str__(self) -> str:
        return f"{self.source}: equals {self.first or f'sample {self.key}'}"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Part:
    """One file of a generation. It holds whole shards, from `first_shard` on."""

    stored: StoredObject
    first_shard: int
    shards: NonNegativeInt


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Generation:
    """One immutable part of the plan."""

    number: int
    first_shard: int
    samples: NonNegativeInt
    samples_per_shard: PositiveInt
    parts: tuple[Part, ...]
    rejected: StoredObject | None
    rejected_count: NonNegativeInt
    duplicates: StoredObject | None
    duplicates_count: NonNegativeInt

    @property
    def objects(self) -> list[StoredObject]:
        """All files of the generation."""
        tables = [table for table in (self.rejected, self.duplicates) if table]
        return [part.stored for part in self.parts] + tables

    @property
    def shards(self) -> int:
        """Number of shards; the last one may be partial."""
        return -(-self.samples // self.samples_per_shard)


@dataclass(frozen=True)
class Plan:
    """All generations of a dataset's plan."""

    folder: Folder
    generations: tuple[Generation, ...]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return sum(generation.shards for generation in self.generations)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(generation.samples for generation in self.generations)

    def generation_of(self, shard: int) -> Generation:
        """The generation that holds a shard. Raises PlanError if there is no such shard."""
        for generation in self.generations:
            if generation.first_shard <= shard < generation.first_shard + generation.shards:
                return generation
        raise PlanError(
            f"{self.folder.url}: shard {shard} is not in the plan, which has {self.shards} (from 0); "
            "resmaster status lists them"
        )

    def require(self, shards: int) -> None:
        """Raise PlanError if there are commits of more shards than the plan has: a part of the plan is lost then."""
        if shards > self.shards:
            raise PlanError(
                f"{self.folder.url}: a part of its plan is gone: it has {self.shards} shards, and commits are of "
                f"{shards}; restore the folder plan/ from a copy, or run: resmaster repair {self.folder.url}"
            )

    def size(self, shard: int) -> int:
        """Number of samples in a shard."""
        generation = self.generation_of(shard)
        before = (shard - generation.first_shard) * generation.samples_per_shard
        return min(generation.samples_per_shard, generation.samples - before)

    def read(self, shard: int) -> list[PlannedSample]:
        """The samples of a shard in order."""
        for part in self.generation_of(shard).parts:
            if part.first_shard <= shard < part.first_shard + part.shards:
                table = _read_part(self.folder, part.stored)
                rows = table.filter(pc.equal(table["shard"], shard)).to_pylist()
                return [PlannedSample(**row) for row in rows]
        raise PlanError(f"{self.folder.url}: shard {shard} is missing in the plan's files; restore the folder plan/")

    def keys_of(self, shard: int) -> list[str]:
        """The keys of a shard's samples in order. Faster than `read`."""
        generation = self.generation_of(shard)
        part = next(part for part in generation.parts if part.first_shard <= shard < part.first_shard + part.shards)
        table = _read_part(self.folder, part.stored)
        start = (shard - part.first_shard) * generation.samples_per_shard
        keys: list[str] = table["key"].slice(start, generation.samples_per_shard).to_pylist()
        return keys

    def pixels(self) -> int:
        """Pixels of all low-res images."""
        tables = [_read_part(self.folder, part.stored) for generation in self.generations for part in generation.parts]
        sizes = (pc.multiply(table["height"].cast("int64"), table["width"].cast("int64")) for table in tables)
        return sum(int(pc.sum(size).as_py()) for size in sizes)

    def find(self, prefix: str) -> list[PlannedSample]:
        """The samples whose keys begin with `prefix`, in order."""
        tables = (_read_part(self.folder, part.stored) for generation in self.generations for part in generation.parts)
        found = (table.filter(pc.starts_with(table["key"], prefix)) for table in tables)
        return [PlannedSample(**row) for table in found for row in table.to_pylist()]

    def places(self) -> Iterator[tuple[str, int]]:
        """The key and the shard of all samples, in order."""
        for generation in self.generations:
            for part in generation.parts:
                table = _read_part(self.folder, part.stored)
                yield from zip(table["key"].to_pylist(), table["shard"].to_pylist())

    def keys(self) -> Iterator[str]:
        """The keys of all samples, in order."""
        for generation in self.generations:
            for part in generation.parts:
                yield from _read_part(self.folder, part.stored)["key"].to_pylist()


def find_plan(folder: Folder) -> Plan:
    """The plan of a dataset. Without a plan, the result has no generations. Raises PlanError if it is damaged."""
    generations: list[Generation] = []
    while True:
        name, mend = layout.plan_record(len(generations)), "restore it from a copy, or run: resmaster repair"
        try:
            found = read_generation(folder, generations)
        except ValueError as error:
            raise PlanError(f"{folder.url_of(name)}: damaged ({error}); {mend} {folder.url}") from error
        if found is None:
            if len(generations) < last_generation(folder):
                raise PlanError(f"{folder.url_of(name)}: gone; {mend} {folder.url}")
            return Plan(folder, tuple(generations))
        generations.append(found)


def read_generation(folder: Folder, before: Sequence[Generation]) -> Generation | None:
    """The generation that follows `before`; None if it has no record. Raises ValueError if its record is damaged."""
    try:
        found = parse_record(Generation, folder.read(layout.plan_record(len(before))))
    except FileNotFoundError:
        return None
    check_numbers(found, before)
    return found


def last_generation(folder: Folder) -> int:
    """The highest number of a generation that has a record, readable or not; -1 if there is none."""
    numbers = (layout.generation_of(name) for name in folder.names(layout.PLAN))
    found = (number for number in numbers if number is not None and folder.exists(layout.plan_record(number)))
    return max(found, default=-1)


def committed_shards(folder: Folder) -> int:
    """The highest number of a shard with a commit record, of any stage and configuration, plus 1. From listings."""
    groups = folder.names(layout.COMMITS)
    places = (layout.attempt_of(name) for group in groups for name in folder.names(group))
    return max((place[0] + 1 for place in places if place), default=0)


def contradicted(plan: Plan, first_shard: int) -> int | None:
    """A shard of a plan, from `first_shard` on, whose commits are of other samples than the plan's; None if all fit."""
    for record in all_records(plan.folder):
        receipt = record.receipt
        if receipt is not None and first_shard <= receipt.shard < plan.shards and not fits(plan, receipt):
            return receipt.shard
    return None


def fits(plan: Plan, receipt: Receipt) -> bool:
    """Whether a commit is of the plan's samples."""
    left_out = {*receipt.failed_keys, *receipt.lost_keys}
    keys = plan.keys_of(receipt.shard)
    good = [key for key in keys if key not in left_out]
    counts = len(receipt.failed_keys) == receipt.samples_failed and len(good) == receipt.samples_ok
    return counts and left_out <= set(keys) and digest_of_keys(good) == receipt.keys_digest


def check_numbers(generation: Generation, before: Sequence[Generation]) -> None:
    """Raise ValueError if the numbers of a generation contradict each other or those of the generations before it."""
    shard = sum(each.shards for each in before)
    fits = (generation.number, generation.first_shard) == (len(before), shard)
    for part in generation.parts:
        fits = fits and part.first_shard == shard
        shard += part.shards
    if not fits or shard != generation.first_shard + generation.shards:
        raise ValueError("its numbers contradict each other")


def read_plan(folder: Folder) -> Plan:
    """The plan of a dataset. Raises PlanError if there is none yet."""
    plan = find_plan(folder)
    if not plan.generations:
        if committed_shards(folder):
            raise PlanError(
                f"{folder.url}: its plan is gone, and its commits are there; restore the folder plan/ from a copy, or "
                f"run: resmaster repair {folder.url}"
            )
        raise PlanError(f"{folder.url}: has no plan yet; start with: resmaster run CONFIG")
    return plan


class _Listing:
    """A table of inputs that became no sample. Memory holds the encoded table, and rows of one row group."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = BytesIO()
        self._table = TableWriter(self._sink, schema)

    def add(self, item: Rejected | Duplicate) -> None:
        self._table.write([asdict(item)])

    @property
    def count(self) -> int:
        return self._table.rows

    def encoded(self) -> bytes:
        """The whole table. Nothing can be added after it."""
        with self._table:
            pass
        return self._sink.getvalue()


class GenerationWriter:
    """Appends a generation to a plan, from samples that are added one by one. Their keys must be new.

    Memory holds the samples of one file, and the encoded tables of what became no sample. Use as a context manager: if
    the generation is not committed within the block, its files are removed.
    """

    def __init__(self, plan: Plan, samples_per_shard: int) -> None:
        self.samples = 0
        """Samples added so far."""
        self._plan, self._samples_per_shard = plan, samples_per_shard
        self._number, self._attempt = len(plan.generations), new_attempt()
        self._rows_per_part = max(1, PART_ROWS // samples_per_shard) * samples_per_shard
        self._rows: list[dict[str, Any]] = []
        self._rejected, self._duplicates = _Listing(REJECTED_SCHEMA), _Listing(DUPLICATES_SCHEMA)
        self._parts: list[Part] = []
        self._unnamed: list[str] = []

    def __enter__(self) -> GenerationWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        discard(self._plan.folder, self._unnamed)

    def add(self, sample: SampleSpec) -> None:
        """Add one sample."""
        if len(self._rows) == self._rows_per_part:  # not earlier, because the last file is written with the record
            self._flush()
        shard = self._plan.shards + self.samples // self._samples_per_shard
        self._rows.append({**asdict(sample), "shard": shard, "index": self._plan.samples + self.samples})
        self.samples += 1

    def reject(self, item: Rejected) -> None:
        """List an input that cannot become a sample."""
        self._rejected.add(item)

    def repeat(self, item: Duplicate) -> None:
        """List an input that equals an earlier input."""
        self._duplicates.add(item)

    def _flush(self, facts: dict[str, str] | None = None) -> None:
        name = layout.plan_part(self._number, len(self._parts), self._attempt)
        self._parts.append(part_of(self._store(name, encode_table(self._rows, PLAN_SCHEMA, facts)), self._rows))
        self._rows = []

    def _store(self, name: str, data: bytes) -> StoredObject:
        self._unnamed.append(name)
        self._plan.folder.write(name, data)
        return described(name, data)

    def commit(self) -> bool:
        """Make the added samples (at least one) part of the plan. False if another planner was faster; then the plan
        must be read again. Raises PlanError if commits are there that are of other samples."""
        folder = self._plan.folder
        refused = repeated = None
        if self._rejected.count:
            refused = self._store(layout.plan_rejected(self._number, self._attempt), self._rejected.encoded())
        if self._duplicates.count:
            repeated = self._store(layout.plan_duplicates(self._number, self._attempt), self._duplicates.encoded())
        generation = Generation(
            number=self._number,
            first_shard=self._plan.shards,
            samples=self.samples,
            samples_per_shard=self._samples_per_shard,
            parts=tuple(self._parts),
            rejected=refused,
            rejected_count=self._rejected.count,
            duplicates=repeated,
            duplicates_count=self._duplicates.count,
        )
        self._flush(facts_of(generation, self._rows))
        generation = replace(generation, parts=tuple(self._parts))
        self._check(generation)
        files, self._unnamed = self._unnamed, []  # while it is unknown who won, nothing is deleted
        try:
            folder.create(layout.plan_record(self._number), record_text(generation))
        except FileExistsError:
            winner = find_plan(folder).generations[self._number]
            if winner.parts and winner.parts[0].stored == self._parts[0].stored:
                return True  # this writer's own: the store answered "exists" to a retried request
            self._unnamed = files
            return False
        return True

    def _check(self, generation: Generation) -> None:
        """Raise PlanError if commits contradict the new generation: an earlier plan was lost, and was another one."""
        plan = self._plan
        if committed_shards(plan.folder) <= generation.first_shard:
            return
        new = Plan(plan.folder, (*plan.generations, generation))
        if (shard := contradicted(new, generation.first_shard)) is not None:
            raise PlanError(
                f"{plan.folder.url}: a part of its plan is gone, and the commits of shard {shard} are of other samples "
                f"than these prompts or images give; restore the folder plan/ from a copy, or run with the prompts or "
                f"images that the lost part was made from"
            )


def part_of(stored: StoredObject, rows: Sequence[Mapping[str, Any]]) -> Part:
    """The part of a generation that the file `stored` with these rows is."""
    first, last = rows[0]["shard"], rows[-1]["shard"]
    return Part(stored, first, last - first + 1)


def facts_of(generation: Generation, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the last file of a generation says beside its rows: the generation without this file, and a digest of the
    rows, so that a whole file can be told from a damaged one."""
    return {"generation": canonical_json(asdict(generation)), "rows_sha256": digest(list(rows))}


@functools.lru_cache(maxsize=2)
def _read_part(folder: Folder, stored: StoredObject) -> pa.Table:
    """The table in a plan file, checked against its record. A file that differs is read once more, because it may have
    been damaged on its way."""
    for _ in range(2):
        try:
            data = folder.read(stored.name)
        except FileNotFoundError:
            raise PlanError(f"{folder.url_of(stored.name)}: gone; restore the folder plan/ from a copy") from None
        if hashlib.sha256(data).hexdigest() == stored.sha256:
            return decode_table(data, PLAN_SCHEMA, stored.name)
    raise PlanError(f"{folder.url_of(stored.name)}: damaged (sha256 differs); restore the folder plan/ from a copy")


def unmasked_key(sample: Sample | PlannedSample) -> str:
    """The key of a prompt's sample without its detail mask. The low-res image depends on this key only."""
    if sample.source is None:
        return sample.key
    return prompt_key(sample.prompt, sample.negative_prompt, sample.height, sample.width, sample.replica)
