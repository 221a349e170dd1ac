"""Tells whether the publication is there, whole, and made from the commits that count now. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, difference
from resmaster_stages.dataset.publication import read_publication
from resmaster_stages.errors import ShardError
from resmaster_stages.storage.filesystem import Folder


@dataclass(frozen=True)
class Published:
    """The state of a dataset's publication."""

    problem: Literal["", "missing", "stale", "damaged"] = ""
    """`stale`: made from other commits; "": none, also while there is nothing to publish."""
    files: tuple[str, ...] = ()
    """The files that are not as they were published, if damaged."""

    def spelled(self) -> str:
        """The problem in a few words, after the word "publication"; "" if there is none."""
        if self.problem == "damaged":
            return f"is damaged ({', '.join(self.files)})"
        return {"": "", "missing": "is missing", "stale": "is older than the commits"}[self.problem]


def published(folder: Folder, commits: str, ready: bool) -> Published:
    """The state of the publication, by the names and sizes of its files.

    commits: digest of the commits that a publication made now would hold. ready: whether it would hold a shard.
    """
    if damaged := _wrong(folder, lambda file: folder.size(file.name) != file.bytes):
        return Published("damaged", damaged)
    record = read_publication(folder)
    if record is None:
        return Published("missing" if ready else "")
    return Published("" if record.commits == commits else "stale")


def changed_files(folder: Folder) -> tuple[str, ...]:
    """The published files that are not as they were published. Every file is read."""
    return _wrong(folder, lambda file: difference(folder, file) is not None)


def _wrong(folder: Folder, differs: Callable[[StoredObject], bool]) -> tuple[str, ...]:
    try:
        record = read_publication(folder)
    except ShardError:
        return (layout.PUBLICATION,)
    return tuple(file.name for file in record.files if differs(file)) if record else ()
