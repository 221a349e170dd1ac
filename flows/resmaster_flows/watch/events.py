"""Events about work in other flow runs, in addition to the events of `resmaster_stages.progress`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resmaster_stages.progress import Event


@dataclass(frozen=True)
class WorkFound(Event):
    """The work to do is known: stage -> samples, in pipeline order, and the shards that hold the samples."""

    pending: Mapping[str, int]
    shards: Sequence[int]


@dataclass(frozen=True)
class Dispatched(Event):
    """`done` of `total` shards are finished; `running` runs are at work and `waiting` runs wait for a worker."""

    done: int
    total: int
    running: int
    waiting: int


@dataclass(frozen=True)
class RunSubmitted(Event):
    """A run was submitted for a share of the work, or found that an earlier process of the build had submitted."""

    run: str
    name: str
    shards: Sequence[int] = ()
    address: str = ""
    """Of the run's page."""


@dataclass(frozen=True)
class RunEnded(Event):
    """The run with id `run` ended. `state` is its state in words; `finished` says whether its share is done."""

    run: str
    state: str
    finished: bool


@dataclass(frozen=True)
class ShardFinished(Event):
    """Every stage of the shard is committed, by another process."""

    shard: int


@dataclass(frozen=True)
class Decision(Event):
    """What a build decided or found out, in one line. Of lines with the same `kind`, only the first ones are shown; ""
    is for lines of which there are few."""

    line: str
    kind: str = ""
