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
    """A run with this id and name was submitted for a share of the work."""

    run: str
    name: str


@dataclass(frozen=True)
class RunEnded(Event):
    """The run with id `run` ended. `state` is its state in words; `finished` says whether its share is done."""

    run: str
    state: str
    finished: bool
