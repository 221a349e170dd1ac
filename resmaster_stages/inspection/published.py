"""Tells whether the publication is there, whole and made from the commits that count now. Tells what the publication
leads readers to. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, difference
from resmaster_stages.dataset.curation import digest_of_choices, read_choices
from resmaster_stages.dataset.publication import PublicationRecord, read_publication
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.tables import decode_table


@dataclass(frozen=True)
class Published:
    """The state of a dataset's publication."""

    problem: Literal["", "missing", "stale", "other choices", "damaged"] = ""
    """`stale`: made from other commits; `other choices`: of the commits that count, and people have chosen since; "":
    none, also while there is nothing to publish."""
    files: tuple[str, ...] = ()
    """The files that are not as they were published, if damaged."""

    def spelled(self) -> str:
        """The problem in a few words, after the word "publication"; "" if there is none."""
        if self.problem == "damaged":
            return f"is damaged ({', '.join(self.files)})"
        return {
            "": "",
            "missing": "is missing",
            "stale": "was made from other commits",
            "other choices": "does not honour the latest choices",
        }[self.problem]

    @property
    def of_the_commits(self) -> bool:
        """Whether the publication is whole and made from the commits that count."""
        return self.problem in ("", "other choices")


def published(folder: Folder, commits: str, ready: bool) -> Published:
    """The state of the publication, by the names and sizes of its files.

    commits: digest of the commits that a publication made now would hold. ready: whether it would hold a shard.
    """
    if damaged := _wrong(folder, lambda file: folder.size(file.name) != file.bytes):
        return Published("damaged", damaged)
    record = read_publication(folder)
    if record is None:
        return Published("missing" if ready else "")
    if record.commits != commits:
        return Published("stale")
    return Published("" if record.choices == digest_of_choices(read_choices(folder)) else "other choices")


def changed_files(folder: Folder) -> tuple[str, ...]:
    """The published files that are not as they were published. Every file is read."""
    return _wrong(folder, lambda file: difference(folder, file) is not None)


@dataclass(frozen=True)
class PublishedShard:
    """A shard of which samples are published."""

    number: int
    records: dict[str, str]
    """Stage -> the record of its first commit."""
    objects: dict[str, str]
    """Stage -> the object that the manifest leads to; only of stages of whose objects the manifest tells."""


def published_shards(folder: Folder, record: PublicationRecord) -> Iterator[PublishedShard]:
    """The shards of which samples are published, by the manifest; none if the manifest is not as it was published."""
    manifest = next((file for file in record.files if file.name == layout.MANIFEST), None)
    if manifest is None or difference(folder, manifest) is not None:
        return
    schema = manifest_schema()
    told = (f"{stage}_{what}" for stage in STAGES for what in ("hash", "object"))
    columns = ["shard", *(name for name in told if name in schema.names)]
    table = decode_table(folder.read(layout.MANIFEST), schema, layout.MANIFEST, columns)
    for row in table.group_by(columns).aggregate([]).to_pylist():
        stages = [stage for stage in STAGES if row.get(f"{stage}_hash")]
        yield PublishedShard(
            number=row["shard"],
            records={stage: layout.commit(stage, row[f"{stage}_hash"], row["shard"]) for stage in stages},
            objects={stage: name for stage in stages if (name := row.get(f"{stage}_object"))},
        )


def _wrong(folder: Folder, differs: Callable[[StoredObject], bool]) -> tuple[str, ...]:
    try:
        record = read_publication(folder)
    except ShardError:
        return (layout.PUBLICATION,)
    return tuple(file.name for file in record.files if differs(file)) if record else ()
