"""The content of a commit record (`Receipt`), and the check of stored objects against it.

The protocol of commits is in `commits`. This module does not look inside the objects.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, with_config

from resmaster_stages.dataset.batches import Batch, unambiguous
from resmaster_stages.dataset.records import NOT_IF_EMPTY
from resmaster_stages.errors import UserError
from resmaster_stages.storage.filesystem import Folder, is_outside, sha256_of
from resmaster_stages.storage.store_errors import is_damage


def describe(name: str, path: Path) -> StoredObject:
    """The record of a local file that is to become the object `name`."""
    return StoredObject(name, sha256_of(path), path.stat().st_size)


def described(name: str, data: bytes) -> StoredObject:
    """The record of `data` that is to become the object `name`."""
    return StoredObject(name, hashlib.sha256(data).hexdigest(), len(data))


def new_attempt() -> str:
    """A new random attempt id (8 hex digits)."""
    return uuid.uuid4().hex[:8]


def _inside(name: str) -> str:
    if is_outside(name) or "\0" in name:
        raise ValueError("cannot be a name in the dataset")
    return name


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("has no time zone")
    return text


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    for name, kind in (("device", int | float), ("unet", int | float), ("versions", str)):
        table = found.get(name, {})
        if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
            raise ValueError(f"{name} is no table of such facts")
    return found


Moment = Annotated[str, AfterValidator(_moment)]
"""A time in ISO 8601 with its time zone."""

Inside = Annotated[str, AfterValidator(_inside)]
"""A name in the dataset. A record with any other name cannot be read."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class StoredObject:
    """An immutable file in the dataset's folder."""

    name: Inside
    sha256: str
    bytes: NonNegativeInt


@with_config(ConfigDict(extra="forbid", validate_default=True))
@dataclass(frozen=True)
class Receipt:
    """The content of a commit record."""

    stage: str
    stage_hash: str
    shard: int
    attempt: str
    generation: int
    """Generation of the plan that the shard belongs to."""
    samples_ok: int
    samples_failed: int
    failed_keys: tuple[str, ...]
    """Samples that failed in this stage. The ledger says why."""
    keys_digest: str
    """sha256 of the keys that succeeded, in order."""
    upstream: dict[str, str]
    """Upstream stage -> attempt that was read."""
    finished_at: Moment
    """UTC, ISO 8601."""
    objects: Annotated[tuple[StoredObject, ...], Field(min_length=1)] = ()
    ledger: Inside | None = None
    """Name of the error ledger of this attempt."""
    seconds: float = 0.0
    """Compute time of all attempts together."""
    provenance: Annotated[dict[str, Any], AfterValidator(_facts)] = field(default_factory=dict)
    """Volatile facts: versions, host, device."""
    number: PositiveInt = 1
    """Number of the attempt at the shard: 1, 2, ...; the highest counts."""
    lost_keys: tuple[str, ...] = ()
    """Planned samples that this attempt did not get, because an earlier stage does not hold them."""
    images: tuple[str, ...] = ()
    """For tars: the place of each sample's image (`shards.spell_image`), in order, so that readers need not walk the
    tar."""
    batches: Annotated[tuple[Batch, ...], AfterValidator(unambiguous)] = ()
    """How the good samples were computed, the most frequent batch first."""
    takes: dict[str, PositiveInt] = field(default_factory=dict, metadata=NOT_IF_EMPTY)
    """Sample -> its take, for samples that were made again with a new seed (`redo`). The take of all others is 0."""


def discard(folder: Folder, names: Sequence[str]) -> None:
    """Delete the files of an attempt that lost. Files that cannot be deleted stay; no record names them."""
    for name in names:
        try:
            folder.remove(name)
        except Exception:  # an unseen leftover is harmless, and the caller's own error matters more
            continue


PIECE_BYTES = 1 << 20
"""Size of the pieces in which an object is read."""


Difference = Literal["gone", "cut off", "changed", "unreadable"]


def difference(folder: Folder, stored: StoredObject) -> Difference | None:
    """How an object differs from its record; None if it is as recorded. An object of a remote store is read once more
    before it counts as changed, because it may have been damaged on its way."""
    found = _difference(folder, stored)
    return found if folder.local or found in (None, "gone") else _difference(folder, stored)


def _difference(folder: Folder, stored: StoredObject) -> Difference | None:
    whole, size = hashlib.sha256(), 0
    try:
        for piece in folder.chunks(stored.name, PIECE_BYTES):
            whole.update(piece)
            size += len(piece)
    except FileNotFoundError:
        return "gone"
    except (OSError, UserError) as error:
        if is_damage(error):
            return "unreadable"
        raise
    if whole.hexdigest() == stored.sha256:
        return None
    return "cut off" if size < stored.bytes else "changed"
