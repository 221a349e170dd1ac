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
    commits/{stage}-{hash8}/000123.r01.json    asks for another attempt at the samples that failed in it
    commits/{stage}-{hash8}/000123.s01.json    a supplement: what became good later
    cache/{stage}-{hash8}-000123/{key}.sample  finished samples of a shard that is not committed yet
    cache/{stage}-{hash8}-000123.json          its breadcrumb: the samples at work
    damaged/{stage}-{hash8}/000123.json        objects of a committed shard that are known to be gone or changed
    report/  manifest.parquet  index.json  README.md

Invariant: names that different attempts may write concurrently hold the attempt, except the one that commits them.
"""

from __future__ import annotations

import re
from typing import Literal

from resmaster_stages.config.dataset import Stage

CONFIG = "config.json"
CONFIGS = "configs"
PLAN = "plan"
COMMITS = "commits"
CACHE = "cache"
COMMITS = "commits"
DAMAGED = "damaged"
MANIFEST = "manifest.parquet"
INDEX = "index.json"
CARD = "README.md"
REPORT = "report"
REPORT_PAGE = "report/index.html"

EXTENSIONS: dict[Stage, Literal["tar", "parquet"]] = {
    "low_res": "tar",
    "captions": "parquet",
    "high_res": "tar",
    "quality": "parquet",
}
"""What each stage writes: images as WebDataset tar, rows as Parquet."""

_NUMBERED = re.compile(r"(?:.*/)?(\d{4,6})\.json")
_NAMESPACE = re.compile(r"commits/([a-z_]+)-([0-9a-f]{8})")
_EXTRA = re.compile(r"(?:.*/)?(\d{6})\.([rs])(\d{2,6})\.json")
_ATTEMPT = re.compile(
    r"(?:low_res|high_res)/\d{6}-[0-9a-f]{8}\.tar"
    r"|(?:captions|quality)/\d{6}-[0-9a-f]{8}\.parquet"
    r"|[a-z_]+/\d{6}-[0-9a-f]{8}\.features\.parquet"
    r"|plan/gen-\d{4}/(?:part-\d{5}|rejected)-[0-9a-f]{8}\.parquet"
)
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


def shard_object(stage: Stage, shard: int, attempt: str) -> str:
    """What one attempt at a shard produced."""
    return f"{stage}/{shard:06d}-{attempt}.{EXTENSIONS[stage]}"


def features_object(stage: Stage, shard: int, attempt: str) -> str:
    """The arrays that one attempt at a shard produced besides: the second object of its commit."""
    return f"{stage}/{shard:06d}-{attempt}.features.parquet"


def ledger_folder(stage: Stage) -> str:
    """Folder of a stage's error ledger."""
    return f"errors/{stage}"


def ledger(stage: Stage, shard: int, attempt: str) -> str:
    """The samples that failed in one attempt at a shard."""
    return f"{ledger_folder(stage)}/{shard:06d}-{attempt}.parquet"


def commit_folder(stage: Stage, stage_hash: str) -> str:
    """Folder of a stage's commit records under one configuration."""
    return f"{COMMITS}/{stage}-{stage_hash[:8]}"


def namespace_of(name: str) -> tuple[str, str] | None:
    """(stage, first 8 digits of its hash) of a folder of commit records; None for any other name."""
    found = _NAMESPACE.fullmatch(name)
    return (found[1], found[2]) if found else None


def commit(stage: Stage, stage_hash: str, shard: int, supplement: int = 0) -> str:
    """The commit record of one shard, or of one of its supplements (1, 2, ...)."""
    extra = f".s{supplement:02d}" if supplement else ""
    return f"{commit_folder(stage, stage_hash)}/{shard:06d}{extra}.json"


def retry_request(stage: Stage, stage_hash: str, shard: int, number: int) -> str:
    """The `number`th (1, 2, ...) request for another attempt at a shard's failed samples."""
    return f"{commit_folder(stage, stage_hash)}/{shard:06d}.r{number:02d}.json"


def extra_of(name: str) -> tuple[int, str, int] | None:
    """(shard, "r" or "s", number) of a request's or supplement's name; None for any other file."""
    found = _EXTRA.fullmatch(name)
    return (int(found[1]), found[2], int(found[3])) if found else None


def damage_folder(stage: Stage, stage_hash: str) -> str:
    """Folder of the marks of damage of a stage under one configuration."""
    return f"{DAMAGED}/{stage}-{stage_hash[:8]}"


def damage(stage: Stage, stage_hash: str, shard: int) -> str:
    """The mark that objects of a committed shard are damaged."""
    return f"{damage_folder(stage, stage_hash)}/{shard:06d}.json"


def spill_folder(stage: Stage, stage_hash: str, shard: int) -> str:
    """Folder of the finished samples of a shard that is not committed yet."""
    return f"{CACHE}/{stage}-{stage_hash[:8]}-{shard:06d}"


def spill(folder: str, key: str) -> str:
    """A finished sample in that folder."""
    return f"{folder}/{key}.sample"


def breadcrumb(stage: Stage, stage_hash: str, shard: int) -> str:
    """Names the samples at work."""
    return f"{spill_folder(stage, stage_hash, shard)}.json"


def number_of(name: str) -> int | None:
    """The number in a commit record's or changed configuration's name; None for any other file."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def is_attempt(name: str) -> bool:
    """Whether it is the name of an object or plan file of one attempt: those that only a record makes part of the
    dataset."""
    return bool(_ATTEMPT.fullmatch(name))


def is_temporary(name: str) -> bool:
    """Whether it is the temporary name of a file that is being written on a disk."""
    return bool(_TEMPORARY.fullmatch(name))


def is_commit(name: str) -> bool:
    """Whether it is the name of a commit record, a supplement's included."""
    extra = extra_of(name)
    return extra[1] == "s" if extra else number_of(name) is not None


def shard_of(name: str) -> int | None:
    """The shard of a commit record's, supplement's or request's name; None for any other file."""
    extra = extra_of(name)
    return extra[0] if extra else number_of(name)


def ledger_shard(name: str) -> int | None:
    """The shard of a ledger file's name; None for any other file."""
    found = _LEDGER.fullmatch(name)
    return int(found[1]) if found else None
