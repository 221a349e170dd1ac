"""The record of the publication: the files that readers get, and the commits and settings that they were made from.

Invariants:
- The record is written after all files that it names. A publication that was interrupted does not fit its record.
- Equal commits and settings of publishing give an equal record: no time or host is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.keys import canonical_json
from resmaster_stages.storage.filesystem import Folder


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class PublicationRecord:
    """The content of the record."""

    commits: str
    """Digest (`CommitsDigest`) of the commits of the published shards and of the settings of publishing."""
    files: tuple[StoredObject, ...]
    config: StoredObject
    """The configuration that counted. It is no part of the publication, and never changes."""
    stages: dict[str, str]
    """Stage -> identity of its result."""
    shards: int
    """Number of shards if all that were planned are published, else 0."""
    choices: str = ""
    """Digest (`curation.digest_of_choices`) of the choices that the publication honours."""

    @property
    def curated(self) -> bool:
        """Whether a curated index is part of the publication."""
        return any(file.name == layout.CURATED_INDEX for file in self.files)


class CommitsDigest:
    """Builds one digest of the commits of all published shards. Memory does not grow with their number."""

    def __init__(self, stages: Iterable[str], settings: Mapping[str, Any]) -> None:
        """settings: those that only publishing reads, without those at their defaults (`Part.publication`)."""
        self._hashes = {stage: hashlib.sha256(stage.encode()) for stage in stages}
        self._settings = canonical_json(settings).encode() if settings else b""

    def add(self, receipt: Receipt) -> None:
        """Add a commit. The commits of one stage must come in the order of the shards."""
        self._hashes[receipt.stage].update(f"{receipt.shard} {receipt.attempt}\n".encode())

    def hexdigest(self) -> str:
        """The digest of what was added so far."""
        commits = b"".join(each.digest() for each in self._hashes.values())
        return hashlib.sha256(commits + self._settings).hexdigest()


def read_publication(folder: Folder) -> PublicationRecord | None:
    """The record of a dataset's publication, or None. Raises ShardError if the record cannot be read."""
    try:
        return parse_record(PublicationRecord, folder.read(layout.PUBLICATION))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, UserError) as error:
        if isinstance(error, ConnectionError):
            raise
        raise ShardError(f"{layout.PUBLICATION} cannot be read ({error})") from error


def write_publication(folder: Folder, record: PublicationRecord) -> None:
    """Write or replace the record."""
    folder.write(layout.PUBLICATION, record_text(record))
