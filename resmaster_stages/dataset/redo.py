"""Requests to make chosen samples again with a new seed, and the takes that they ask for.

The take of a sample is 0 at first. Each request gives its samples their next takes: 1, 2, ... A take holds in the stage
from which the sample is made again and in all stages after it, and is a part of the sample's seeds there. Commit
records say which takes they hold.

Invariants:
- A request is a record in the dataset before any of its samples is made, so that every run of the dataset fulfils it.
- A record is created by exactly one writer and never changed. A writer that finds its number taken has read too little:
  it reads the others' requests and asks anew.
- Takes only grow. A request that is lost takes nothing back of what was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import ConfigDict, PositiveInt, with_config

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import Moment
from resmaster_stages.dataset.records import parse_record
from resmaster_stages.errors import PlanError
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.filesystem import Folder

Takes = Mapping[str, int]
"""Sample -> take. Samples of take 0 are absent."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class RedoRequest:
    """The content of a record."""

    number: PositiveInt
    stage: str
    """The first stage in which the samples are made again."""
    takes: dict[str, dict[str, PositiveInt]]
    """Shard (its number as text, for JSON) -> sample -> take that is asked for."""
    asked_at: Moment
    """UTC, ISO 8601, with microseconds, by the clock of the host that asked."""

    @property
    def keys(self) -> frozenset[str]:
        """The samples."""
        return frozenset(key for takes in self.takes.values() for key in takes)


@dataclass(frozen=True)
class Redos:
    """All requests of a dataset, in order."""

    requests: tuple[RedoRequest, ...] = ()

    @cached_property
    def _by_shard(self) -> dict[int, dict[str, dict[str, int]]]:
        found: dict[int, dict[str, dict[str, int]]] = {}
        for request in self.requests:
            for shard, takes in request.takes.items():
                raise_to(found.setdefault(int(shard), {}).setdefault(request.stage, {}), takes)
        return found

    @property
    def last(self) -> int:
        """Number of the last request; 0 if there is none."""
        return max((request.number for request in self.requests), default=0)

    @property
    def shards(self) -> frozenset[int]:
        """The shards of all samples that were ever asked for again."""
        return frozenset(self._by_shard)

    def asked(self, shard: int) -> Mapping[str, Takes]:
        """First stage -> sample -> highest take that is asked for from this stage on."""
        return self._by_shard.get(shard, {})

    @cached_property
    def last_asked(self) -> Mapping[str, str]:
        """Sample -> when it was last asked for again (`RedoRequest.asked_at`)."""
        return {key: request.asked_at for request in self.requests for key in request.keys}


def raise_to(takes: dict[str, int], others: Takes) -> None:
    """Raise `takes` to those of `others` that are higher."""
    for key, take in others.items():
        takes[key] = max(take, takes.get(key, 0))


def request_names(folder: Folder) -> list[str]:
    """The names of all requests, readable or not, in order."""
    return sorted(name for name in folder.names(layout.REDO) if layout.number_of(name) is not None)


def parse_request(name: str, data: bytes) -> RedoRequest:
    """The request in a record. Raises ValueError if the record is damaged."""
    request = parse_record(RedoRequest, data)
    if layout.redo(request.number) != name or not all(map(str.isdecimal, request.takes)):
        raise ValueError("its numbers contradict its name or each other")
    return request


def read_redos(folder: Folder) -> Redos:
    """All requests of a dataset, from one listing. Raises PlanError if one cannot be read."""
    names = request_names(folder)
    found = folder.read_many(names, lenient=True)
    requests = []
    for name in names:
        try:
            requests.append(parse_request(name, found.get(name, b"")))
        except ValueError as error:
            raise PlanError(
                f"{folder.url_of(name)}: damaged ({error}); restore it from a copy, or delete it, and ask for its "
                f"samples again: resmaster repair {quoted(folder.url)} --redo KEYS"
            ) from error
    return Redos(tuple(requests))
