"""The record of the publication: the files that readers get, and the commits that the files were made from.

Invariants:
- The record is written after all files that it names. A publication that was interrupted does not fit its record.
- Equal commits give an equal record: no time or host is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ConfigDict, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Receipt, StoredObject
from resmaster_stages.dataset.records import parse_record, record_text
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.storage.filesystem import Folder


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class PublicationRecord:
    """The content of the record."""

    commits: str
    """Digest (`CommitsDigest`) of the commits of the published shards."""
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

    def __init__(self, stages: Iterable[str]) -> None:
        self._hashes = {stage: hashlib.sha256(stage.encode()) for stage in stages}

    def add(self, receipt: Receipt) -> None:
        """Add a commit. The commits of one stage must come in the order of the shards."""
        self._hashes[receipt.stage].update(f"{receipt.shard} {receipt.attempt}\n".encode())

    def hexdigest(self) -> str:
        """The digest of what was added so far."""
        return hashlib.sha256(b"".join(each.digest() for each in self._hashes.values())).hexdigest()


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
