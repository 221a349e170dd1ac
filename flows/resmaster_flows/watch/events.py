"""What happens to work that other runs do: events beside those of `resmaster_stages.progress`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resmaster_stages.progress import Event


@dataclass(frozen=True)
class WorkFound(Event):
    """There is this much to do: stage -> samples, in the pipeline's order, and the shards that they are in."""

    pending: Mapping[str, int]
    shards: Sequence[int]


@dataclass(frozen=True)
class Dispatched(Event):
    """`done` of `total` shards are finished; so many runs are at work or wait."""

    done: int
    total: int
    running: int
    waiting: int


@dataclass(frozen=True)
class RunSubmitted(Event):
    """Others were asked to do a share of the work, in a run of this id and name."""

    run: str
    name: str


@dataclass(frozen=True)
class RunEnded(Event):
    """That run ended, in a state that is told in words; `finished` if its share is done."""

    run: str
    state: str
    finished: bool
