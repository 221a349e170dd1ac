"""Defines every path of a dataset, by pure functions. Does not access storage.

Names are relative to the dataset's folder, with forward slashes:

    config.json                                what was asked for, written once
    configs/0001.json                          later changes of stages that come after the plan
    redo/0001.json                             requests to make samples again with a new seed
    excluded/0001.json                         keys that are never planned
    plan/gen-0000/part-00000-{attempt}.parquet, rejected-{attempt}.parquet, duplicates-{attempt}.parquet, _PLAN.json
    low_res|high_res/000123-{attempt}.tar
    captions|quality/000123-{attempt}.parquet
    quality/000123-{attempt}.features.parquet  feature vectors, where the configuration asks for them
    errors/{stage}/000123-{attempt}.parquet
    attempts/{stage}-{hash8}/000123-{time}-{attempt}-{error class}.json     attempts that ended by an error
    commits/{stage}-{hash8}/000123.json        the truth
    commits/{stage}-{hash8}/000123.2.json      a later attempt, at what failed or is made again; the highest counts
    cache/{stage}-{hash8}-000123/{key}.sample  finished samples of a shard that is not committed yet
    cache/{stage}-{hash8}-000123/at.json       its breadcrumb: the samples at work
    damaged/{stage}-{hash8}/000123.json        objects of a committed shard that are known to be gone or changed
    curation/{time}-{attempt}.parquet          what people chose about samples, a file per session
    report/  manifest.parquet  index.json  README.md
    curation.parquet                           the choices that count; only if there are any
    curated.json  curated/000123-{digest}.tar  index and shards without rejected samples, if they were asked for
    publication.json                           names the files above with sha256 and size; written after them

Invariant: names that attempts may write concurrently contain the attempt id. Only the name of a record does not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from resmaster_stages.dataset.stages import STAGES

CONFIG = "config.json"
CONFIGS = "configs"
REDO = "redo"
EXCLUDED = "excluded"
PLAN = "plan"
COMMITS = "commits"
ATTEMPTS = "attempts"
ERRORS = "errors"
CACHE = "cache"
DAMAGED = "damaged"
MANIFEST = "manifest.parquet"
INDEX = "index.json"
CARD = "README.md"
REPORT = "report"
REPORT_PAGE = "report/index.html"
PUBLICATION = "publication.json"
CURATION = "curation"
CURATION_TABLE = "curation.parquet"
CURATED_INDEX = "curated.json"
CURATED = "curated"

_NUMBERED = re.compile(r"(?:.*/)?(\d{4,6})\.json")
_NAMESPACE = re.compile(r"commits/([a-z_]+)-([0-9a-f]{8})")
_RECORD = re.compile(r"(?:.*/)?(\d{6})(?:\.([2-9]|[1-9]\d+))?\.json")
_OBJECT = re.compile(r"([a-z_]+)/(\d{6})-[0-9a-f]{8}\.(?:tar|parquet|features\.parquet)")
_GENERATION = re.compile(r"plan/gen-(\d{4})")
_PLAN_PART = re.compile(r"plan/gen-\d{4}/part-\d{5}-[0-9a-f]{8}\.parquet")
_PLAN_FILE = re.compile(r"plan/gen-(\d{4})/(?:part-\d{5}|rejected|duplicates)-[0-9a-f]{8}\.parquet")
_TEMPORARY = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.tmp")
_LEDGER = re.compile(r"errors/[a-z_]+/(\d{6})-[0-9a-f]{8}\.parquet")
_CURATED = re.compile(r"curated/\d{6}-[0-9a-f]{8}\.tar")
_CHOICES = re.compile(r"curation/\d{8}T\d{6}-[0-9a-f]{8}\.parquet")
_FAILED_ATTEMPT = re.compile(r"attempts/[a-z_]+-[0-9a-f]{8}/(\d{6})-(\d{8}T\d{12})-([0-9a-f]{8})-(\w{1,80})\.json")


def contact_sheet(number: int) -> str:
    """A contact sheet of the report."""
    return f"{REPORT}/contact-{number:03d}.png"


def changed_config(number: int) -> str:
    """The `number`th changed configuration (1, 2, ...). The first configuration is `config.json`."""
    return f"{CONFIGS}/{number:04d}.json"


def redo(number: int) -> str:
    """The `number`th request (1, 2, ...) to make samples again with a new seed."""
    return f"{REDO}/{number:04d}.json"


def excluded(number: int) -> str:
    """The `number`th list (1, 2, ...) of keys that are never planned."""
    return f"{EXCLUDED}/{number:04d}.json"


def generation(number: int) -> str:
    """Folder of a generation of the plan."""
    return f"{PLAN}/gen-{number:04d}"


def plan_record(number: int) -> str:
    """The record that makes a generation of the plan valid; written last, by one planner only."""
    return f"{generation(number)}/_PLAN.json"


def plan_part(number: int, part: int, attempt: str) -> str:
    """One file of planned samples."""
    return f"{generation(number)}/part-{part:05d}-{attempt}.parquet"


def plan_rejected(number: int, attempt: str) -> str:
    """The inputs that the planner of a generation rejected, and why."""
    return f"{generation(number)}/rejected-{attempt}.parquet"


def plan_duplicates(number: int, attempt: str) -> str:
    """The inputs that the planner of a generation left out because they equal an earlier input."""
    return f"{generation(number)}/duplicates-{attempt}.parquet"


def shard_object(stage: str, shard: int, attempt: str) -> str:
    """The main object of one attempt at a shard: a tar or a table."""
    return f"{stage}/{shard:06d}-{attempt}.{STAGES[stage].extension}"


def features_object(stage: str, shard: int, attempt: str) -> str:
    """The feature vectors of one attempt at a shard: the second object of its commit."""
    return f"{stage}/{shard:06d}-{attempt}.features.parquet"


def ledger_folder(stage: str) -> str:
    """Folder of a stage's error ledger."""
    return f"{ERRORS}/{stage}"


def ledger(stage: str, shard: int, attempt: str) -> str:
    """The error ledger of one attempt at a shard."""
    return f"{ledger_folder(stage)}/{shard:06d}-{attempt}.parquet"


def choices(time: str, attempt: str) -> str:
    """The file of the choices of one session. time: UTC, as `20261128T225553`."""
    return f"{CURATION}/{time}-{attempt}.parquet"


def is_choices(name: str) -> bool:
    """Whether `name` is that of a file of choices of one session."""
    return bool(_CHOICES.fullmatch(name))


def curated_shard(shard: int, digest: str) -> str:
    """The copy of a shard's tar without rejected samples. digest: of what is copied."""
    return f"{CURATED}/{shard:06d}-{digest[:8]}.tar"


def is_curated(name: str) -> bool:
    """Whether `name` is that of a copy of a shard without rejected samples."""
    return bool(_CURATED.fullmatch(name))


class FailedName(NamedTuple):
    """What the name of the record of a failed attempt says, so that a listing is mostly enough."""

    shard: int
    time: str
    """UTC, as `20261128T225553123456`: names of one shard sort by time."""
    attempt: str
    error_class: str


def attempts_folder(stage: str, stage_hash: str) -> str:
    """Folder of the records of failed attempts of a stage under one configuration."""
    return f"{ATTEMPTS}/{stage}-{stage_hash[:8]}"


def failed_attempt(stage: str, stage_hash: str, failed: FailedName) -> str:
    """The record of a failed attempt."""
    name = f"{failed.shard:06d}-{failed.time}-{failed.attempt}-{failed.error_class}.json"
    return f"{attempts_folder(stage, stage_hash)}/{name}"


def failed_attempt_of(name: str) -> FailedName | None:
    """The inverse of `failed_attempt`; None for any other name."""
    found = _FAILED_ATTEMPT.fullmatch(name)
    return FailedName(int(found[1]), found[2], found[3], found[4]) if found else None


def commit_folder(stage: str, stage_hash: str) -> str:
    """Folder of a stage's commit records under one configuration."""
    return f"{COMMITS}/{stage}-{stage_hash[:8]}"


def namespace_of(name: str) -> tuple[str, str] | None:
    """(stage, first 8 digits of its hash) from the name of a folder of commit records; None for any other name."""
    found = _NAMESPACE.fullmatch(name)
    return (found[1], found[2]) if found else None


def commit(stage: str, stage_hash: str, shard: int, number: int = 1) -> str:
    """The commit record of the `number`th committed attempt (1, 2, ...) at a shard."""
    later = f".{number}" if number > 1 else ""
    return f"{commit_folder(stage, stage_hash)}/{shard:06d}{later}.json"


def attempt_of(name: str) -> tuple[int, int] | None:
    """(shard, number of the attempt) from the name of a commit record; None for any other name."""
    found = _RECORD.fullmatch(name)
    return (int(found[1]), int(found[2] or 1)) if found else None


def damage_folder(stage: str, stage_hash: str) -> str:
    """Folder of the damage marks of a stage under one configuration."""
    return f"{DAMAGED}/{stage}-{stage_hash[:8]}"


def damage(stage: str, stage_hash: str, shard: int) -> str:
    """The mark that objects of a committed shard are damaged."""
    return f"{damage_folder(stage, stage_hash)}/{shard:06d}.json"


def spill_folder(stage: str, stage_hash: str, shard: int) -> str:
    """Folder of the spilled samples (finished samples) of a shard that is not committed yet."""
    return f"{CACHE}/{stage}-{stage_hash[:8]}-{shard:06d}"


def spill(folder: str, key: str) -> str:
    """A spilled sample in a spill folder."""
    return f"{folder}/{key}.sample"


def breadcrumb(stage: str, stage_hash: str, shard: int) -> str:
    """The breadcrumb of a shard, which names the samples at work."""
    return f"{spill_folder(stage, stage_hash, shard)}/at.json"


def number_of(name: str) -> int | None:
    """The number in the name of a damage mark, a changed configuration, a request to make samples again or a list of
    excluded keys; None for any other name."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def object_of(name: str) -> tuple[str, int] | None:
    """(stage, shard) from the name of an object of one attempt; None for any other name."""
    found = _OBJECT.fullmatch(name)
    return (found[1], int(found[2])) if found and found[1] in STAGES else None


def generation_of(name: str) -> int | None:
    """The generation from the name of a plan's folder or of a file in it that a planner wrote; None for others."""
    found = _GENERATION.fullmatch(name) or _PLAN_FILE.fullmatch(name)
    return int(found[1]) if found else None


def is_plan_part(name: str) -> bool:
    """Whether `name` is that of a file of planned samples."""
    return bool(_PLAN_PART.fullmatch(name))


def is_attempt(name: str) -> bool:
    """Whether `name` is that of an object or plan file of one attempt.

    Only a record makes such a file part of the dataset.
    """
    return object_of(name) is not None or bool(_PLAN_FILE.fullmatch(name))


def is_temporary(name: str) -> bool:
    """Whether `name` is the temporary name of a local file that is being written."""
    return bool(_TEMPORARY.fullmatch(name))


def ledger_shard(name: str) -> int | None:
    """The shard from the name of a ledger file; None for any other name."""
    found = _LEDGER.fullmatch(name)
    return int(found[1]) if found else None
