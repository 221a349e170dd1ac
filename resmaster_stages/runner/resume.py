"""Saves finished samples of an uncommitted shard (spills them), so that a killed run can be resumed.

A spilled sample is one file in the dataset's `cache/`: the sha256 of the rest, a line of JSON, and the sample's files
one after the other. It is read back as exactly the Output that the stage gave, with the batch in which it was made. So
the shard's bytes are the same, and its commit record says how they came about.

Invariants:
- A spilled sample that is torn, damaged, of another configuration, of another take or of other inputs is ignored, and
  the sample is computed again. Inputs are others if an earlier stage was made anew.
- Only `compute` reads spilled samples, before it computes. They are deleted when the shard is committed.
- Finished samples wait until they represent `seconds` of work, and are then written together. So a shard of quick
  samples writes nothing.
- Spilling is optional. A spilled sample that cannot be written, read or deleted costs at most a repetition of work, and
  never an error. In a race, the winner deletes the cache while the loser writes into it. Only an outage while samples
  are read is raised, because they may be hours of work.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.batches import Batch
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.redo import Takes
from resmaster_stages.dataset.sample import Output
from resmaster_stages.keys import canonical_json
from resmaster_stages.runner.quarantine import STORE_ERRORS


def encode(output: Output, origin: str, seconds: float = 0.0) -> bytes:
    """Encode an Output without error as a file. Its rows must be plain JSON values.

    origin: what it was made from. seconds: in which it was made.
    """
    sizes = {extension: len(data) for extension, data in output.files.items()}
    head = {
        "key": output.key,
        "origin": origin,
        "seconds": round(seconds, 3),
        "batch": asdict(output.batch) if output.batch else None,
        "files": list(sizes.items()),
        "rows": output.rows,
    }
    body = b"\n".join([canonical_json(head).encode(), b"".join(output.files.values())])
    return hashlib.sha256(body).hexdigest().encode() + body


def decode(data: bytes, origin: str) -> Output | None:
    """The inverse of `encode`. None if the file is damaged, of another origin or of another version."""
    head, content = _parts(data)
    if head.get("origin") != origin:
        return None
    files, start = {}, 0
    for extension, size in head["files"]:
        files[extension] = content[start : start + size]
        start += size
    try:
        batch = Batch(**{name: _frozen(value) for name, value in head["batch"].items()}) if head["batch"] else None
    except TypeError:  # another version of this project has other fields
        return None
    return Output(key=head["key"], files=files, rows=head["rows"], batch=batch)


def seconds_of(data: bytes) -> float:
    """The seconds in which an encoded Output was made; 0 if the file is damaged or of an earlier version."""
    return float(_parts(data)[0].get("seconds", 0.0))


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the content of an encoded Output. The head of a damaged file is empty."""
    checksum, body = data[:64], data[64:]
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return {}, b""
    line, _, content = body.partition(b"\n")
    return json.loads(line), content


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Origins:
    """What the samples of a shard are made from."""

    upstream: Mapping[str, str] = field(default_factory=dict)
    """Earlier stage -> its attempt that is read."""
    takes: Takes = field(default_factory=dict)
    """Sample -> its take, if that is not 0."""


class Spill:
    """The spilled samples of one stage of one shard. With `seconds` None, none are written or read."""

    def __init__(
        self,
        commits: Commits,
        shard: int,
        seconds: float | None,
        cache: Collection[str],
        origins: Origins | None = None,
    ) -> None:
        """cache: names of the files in the shard's cache folder."""
        self.folder = commits.folder
        origins = origins or Origins()
        self._origin, self._takes = " ".join([commits.stage_hash, *origins.upstream.values()]), origins.takes
        self._place = layout.spill_folder(commits.stage, commits.stage_hash, shard)
        self._seconds = seconds
        self._cache = cache
        self._waiting: dict[str, Output] = {}
        self._since = self._counted = time.monotonic()
        self._used = False
        self.saved_seconds = 0.0
        """Time in which the samples were made that this attempt has written."""
        self.resumed_seconds = 0.0
        """Time in which earlier attempts made the samples that were read."""

    def read(self, keys: Sequence[str]) -> dict[str, Output]:
        """Key -> Output, for those of `keys` that an earlier run finished."""
        if self._seconds is None:
            return {}
        wanted = {layout.spill(self._place, key): key for key in keys}
        found = self.folder.read_many([name for name in self._cache if name in wanted], lenient=True)
        self._used = bool(found)
        outputs: dict[str, Output] = {}
        for name, data in found.items():
            output = decode(data, self._origin_of(wanted[name]))
            if output is not None and output.key == wanted[name]:
                outputs[output.key] = output
                self.resumed_seconds += seconds_of(data)
        self._since = self._counted = time.monotonic()
        return outputs

    def keep(self, output: Output) -> None:
        """Hold a finished sample until `flush` writes it. Samples with errors or arrays are not spilled."""
        if self._seconds is not None and output.error is None and not output.arrays:
            self._waiting[layout.spill(self._place, output.key)] = output

    def _origin_of(self, key: str) -> str:
        return f"{self._origin} take {self._takes[key]}" if key in self._takes else self._origin

    def flush(self) -> None:
        """Write the waiting samples if `seconds` have passed since the last write."""
        now = time.monotonic()
        if self._waiting and self._seconds is not None and now - self._since >= self._seconds:
            self._used = True
            passed, self._counted = now - self._counted, now  # the next samples are made while these are written
            each = passed / len(self._waiting)
            files = {name: encode(output, self._origin_of(output.key), each) for name, output in self._waiting.items()}
            with suppress(*STORE_ERRORS):
                self.folder.write_many(files)
                self.saved_seconds += passed
            self._waiting = {}
            self._since = time.monotonic()

    def drop(self) -> None:
        """Delete all spilled samples, because the shard is committed. Files that cannot be deleted are never read."""
        if self._used:
            with suppress(*STORE_ERRORS):
                self.folder.remove_all(self._place)
