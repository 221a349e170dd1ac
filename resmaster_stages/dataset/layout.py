"""Every path of a dataset, in this one module. Pure functions; touches no storage.

Names are relative to the dataset's folder, with forward slashes:

    config.json                                what was asked for, written once
    configs/0001.json                          later changes of stages that come after the plan
    plan/gen-0000/part-00000-{attempt}.parquet, rejected-{attempt}.parquet, _PLAN.json
    low_res|high_res/000123-{attempt}.tar
    captions|quality/000123-{attempt}.parquet
    quality/000123-{attempt}.features.parquet  feature vectors, where the configuration asks for them
    errors/{stage}/000123-{attempt}.parquet
    commits/{stage}-{hash8}/000123.json        the truth
    commits/{stage}-{hash8}/000123.2.json      a later attempt, at what failed in the first; the highest number counts
    cache/{stage}-{hash8}-000123/{key}.sample  finished samples of a shard that is not committed yet
    cache/{stage}-{hash8}-000123/at.json       its breadcrumb: the samples at work
    damaged/{stage}-{hash8}/000123.json        objects of a committed shard that are known to be gone or changed
    report/  manifest.parquet  index.json  README.md

Invariant: names that different attempts may write concurrently hold the attempt, except the one that commits them.
"""

from __future__ import annotations

import re

from resmaster_stages.dataset.stages import STAGES

CONFIG = "config.json"
CONFIGS = "configs"
PLAN = "plan"
COMMITS = "commits"
CACHE = "cache"
DAMAGED = "damaged"
MANIFEST = "manifest.parquet"
INDEX = "index.json"
CARD = "README.md"
REPORT = "report"
REPORT_PAGE = "report/index.html"

_NUMBERED = re.compile(r"(?:.*/)?(\d{4,6})\.json")
_NAMESPACE = re.compile(r"commits/([a-z_]+)-([0-9a-f]{8})")
_RECORD = re.compile(r"(?:.*/)?(\d{6})(?:\.([2-9]|[1-9]\d+))?\.json")
_OBJECT = re.compile(r"([a-z_]+)/\d{6}-[0-9a-f]{8}\.(?:tar|parquet|features\.parquet)")
_PLAN_FILE = re.compile(r"plan/gen-\d{4}/(?:part-\d{5}|rejected)-[0-9a-f]{8}\.parquet")
_TEMPORARY = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.tmp")
_LEDGER = re.compile(r"errors/[a-z_]+/(\d{6})-[0-9a-f]{8}\.parquet")


def contact_sheet(number: int) -> str:
    """A page of thumbnails in the report."""
    return f"{REPORT}/contact-{number:03d}.png"


def changed_config(number: int) -> str:
    """The `number`th configuration (1, 2, ...); number 0 is `config.json`."""
    return f"{CONFIGS}/{number:04d}.json"


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
    """What the planner of a generation turned down, and why."""
    return f"{generation(number)}/rejected-{attempt}.parquet"


def shard_object(stage: str, shard: int, attempt: str) -> str:
    """What one attempt at a shard produced."""
    return f"{stage}/{shard:06d}-{attempt}.{STAGES[stage].extension}"


def features_object(stage: str, shard: int, attempt: str) -> str:
    """The arrays that one attempt at a shard produced besides: the second object of its commit."""
    return f"{stage}/{shard:06d}-{attempt}.features.parquet"


def ledger_folder(stage: str) -> str:
    """Folder of a stage's error ledger."""
    return f"errors/{stage}"


def ledger(stage: str, shard: int, attempt: str) -> str:
    """The samples that failed in one attempt at a shard."""
    return f"{ledger_folder(stage)}/{shard:06d}-{attempt}.parquet"


def commit_folder(stage: str, stage_hash: str) -> str:
    """Folder of a stage's commit records under one configuration."""
    return f"{COMMITS}/{stage}-{stage_hash[:8]}"


def namespace_of(name: str) -> tuple[str, str] | None:
    """(stage, first 8 digits of its hash) of a folder of commit records; None for any other name."""
    found = _NAMESPACE.fullmatch(name)
    return (found[1], found[2]) if found else None


def commit(stage: str, stage_hash: str, shard: int, number: int = 1) -> str:
    """The commit record of the `number`th (1, 2, ...) attempt at a shard that was committed."""
    later = f".{number}" if number > 1 else ""
    return f"{commit_folder(stage, stage_hash)}/{shard:06d}{later}.json"


def attempt_of(name: str) -> tuple[int, int] | None:
    """(shard, number of the attempt) of a commit record's name; None for any other file."""
    found = _RECORD.fullmatch(name)
    return (int(found[1]), int(found[2] or 1)) if found else None


def damage_folder(stage: str, stage_hash: str) -> str:
    """Folder of the marks of damage of a stage under one configuration."""
    return f"{DAMAGED}/{stage}-{stage_hash[:8]}"


def damage(stage: str, stage_hash: str, shard: int) -> str:
    """The mark that objects of a committed shard are damaged."""
    return f"{damage_folder(stage, stage_hash)}/{shard:06d}.json"


def spill_folder(stage: str, stage_hash: str, shard: int) -> str:
    """Folder of the finished samples of a shard that is not committed yet."""
    return f"{CACHE}/{stage}-{stage_hash[:8]}-{shard:06d}"


def spill(folder: str, key: str) -> str:
    """A finished sample in that folder."""
    return f"{folder}/{key}.sample"


def breadcrumb(stage: str, stage_hash: str, shard: int) -> str:
    """Names the samples at work."""
    return f"{spill_folder(stage, stage_hash, shard)}/at.json"


def number_of(name: str) -> int | None:
    """The number in a commit record's or changed configuration's name; None for any other file."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def is_attempt(name: str) -> bool:
    """Whether it is the name of an object or plan file of one attempt.

    Only a record makes those part of the dataset.
    """
    found = _OBJECT.fullmatch(name)
    return (found is not None and found[1] in STAGES) or bool(_PLAN_FILE.fullmatch(name))


def is_temporary(name: str) -> bool:
    """Whether it is the temporary name of a file that is being written on a disk."""
    return bool(_TEMPORARY.fullmatch(name))


def ledger_shard(name: str) -> int | None:
    """The shard of a ledger file's name; None for any other file."""
    found = _LEDGER.fullmatch(name)
    return int(found[1]) if found else None
