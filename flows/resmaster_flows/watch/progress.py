"""Tracks the progress of a build from events: counters, the time left, and the state of every shard and run.

This module draws nothing and does not use Prefect. Other threads may read a `Progress` while it receives events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from resmaster_flows.watch.events import Dispatched, RunEnded, RunSubmitted, ShardFinished, WorkFound
from resmaster_flows.watch.pace import TimeLeft
from resmaster_stages.progress import (
    Event,
    Listener,
    Note,
    Planned,
    SampleDone,
    ShardDone,
    ShardFailed,
    ShardStarted,
    Step,
)

FAILED, AT_WORK, FINISHED, WAITING = range(4)
"""Ranks of rows: lower ranks are shown first."""


@dataclass
class Shard:
    """A shard that this process works on."""

    place: int
    """Position among the shards of the build, from 1."""
    state: str = "waiting"
    rank: int = WAITING
    seconds: float = 0.0
    """Time of all stages that this process committed."""
    last_seconds: float = 0.0
    """Time of the last stage that this process committed."""
    samples_failed: int = 0
    began: float | None = None
    """When the current stage began, in seconds of a monotonic clock; None if no stage is at work."""


@dataclass
class Run:
    """A flow run that works on shards elsewhere."""

    name: str
    shards: tuple[int, ...] = ()
    address: str = ""
    """Of the run's page."""
    state: str = "submitted"
    rank: int = AT_WORK


class Progress:
    """The progress of a build of `shards`. `hear` is its listener.

    pending: stage -> samples to do. A `WorkFound` event may give `pending` and `shards` later.
    reckoned: `pending` also counts the samples of shards that may already be committed.
    """

    def __init__(
        self,
        pending: Mapping[str, int] = MappingProxyType({}),
        shards: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        reckoned: bool = False,
    ) -> None:
        self.reckoned = reckoned
        self._clock = clock
        self._begin = self._sample_began = clock()
        self.samples_done = self.images = self.samples_failed = 0
        self._work_found(WorkFound(pending, shards))
        self.runs: dict[str, Run] = {}
        self.failed_elsewhere: Mapping[int, int] = {}
        """Shard -> its failed samples, of the shards that other processes work on. Whoever reads the ledger sets it."""
        self.now: ShardStarted | None = None
        self.step: Step | None = None
        self.dispatched: Dispatched | None = None
        self.ended = False

    # ------------------------------------------------------------------------------------------------------- listening

    def hear(self, event: Event) -> None:
        """Update the progress from an event."""
        match event:
            case WorkFound():
                self._work_found(event)
            case ShardStarted():
                self._shard_started(event)
            case SampleDone():
                self._sample_done(event)
            case ShardDone():
                self._shard_done(event)
            case ShardFailed():
                shard = self._shard(event.shard)
                shard.state, shard.rank = f"failed: {event.error}", FAILED
            case Step():
                self.step = event
            case RunSubmitted():
                self.runs[event.run] = Run(event.name, tuple(event.shards), event.address)
            case RunEnded():
                run = self.runs[event.run]
                run.state, run.rank = event.state, FINISHED if event.finished else FAILED
            case ShardFinished():
                shard = self._shard(event.shard)
                shard.state, shard.rank = "finished", FINISHED
            case Dispatched():
                self.dispatched = event

    def end(self) -> None:
        """The run has ended: no shard is at work or waits any more."""
        self.ended = True
        for shard in list(self.shards.values()):
            if shard.rank == AT_WORK:
                shard.state, shard.rank = f"{shard.state} not finished", FAILED
            elif shard.rank == WAITING:
                shard.state = "not begun"

    def _work_found(self, event: WorkFound) -> None:
        self._left = TimeLeft(dict(event.pending))
        self._last_stage, self.images_total = list(event.pending.items())[-1] if event.pending else ("quality", 0)
        self.samples_total = sum(event.pending.values())
        self.shards = {shard: Shard(place) for place, shard in enumerate(event.shards, start=1)}

    def _shard_started(self, event: ShardStarted) -> None:
        shard = self._shard(event.shard)
        shard.state, shard.rank = event.stage, AT_WORK
        shard.began = self._sample_began = self._clock()
        self.now, self.step = event, None

    def _sample_done(self, event: SampleDone) -> None:
        now = self._clock()
        self._left.sample_done(event.stage, now - self._sample_began)
        self._sample_began, self.step = now, None
        self.samples_done += 1
        self.images += event.ok and event.stage == self._last_stage
        self.samples_failed += not event.ok
        self._shard(event.shard).samples_failed += not event.ok

    def _shard_done(self, event: ShardDone) -> None:
        shard = self._shard(event.shard)
        if not event.cached:
            shard.last_seconds = 0.0 if shard.began is None else self._clock() - shard.began
            shard.seconds += shard.last_seconds
            shard.began = None
        elif self.reckoned:
            self.samples_total -= event.samples
            self._left.drop(event.stage, event.samples)
        if event.stage == self._last_stage:
            shard.state, shard.rank = "finished", FINISHED

    def _shard(self, number: int) -> Shard:
        return self.shards.setdefault(number, Shard(len(self.shards) + 1))

    # --------------------------------------------------------------------------------------------------------- reading

    @property
    def percent(self) -> float:
        """How much of the work is done, in percent of the work at the start."""
        if self.dispatched:
            return 100.0 * self.dispatched.done / max(1, self.dispatched.total)
        if all(shard.rank == FINISHED for shard in list(self.shards.values())):
            return 100.0
        return round(min(100.0, 100.0 * self.samples_done / max(1, self.samples_total)), 1)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begin

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end; None while unknown."""
        if not self.dispatched:
            return self._left.seconds()
        done, total = self.dispatched.done, self.dispatched.total
        return self.seconds * (total - done) / done if done else None


def plans(say: Callable[[str], None]) -> Listener:
    """A listener that passes the line of each `Planned` event to `say`."""

    def hear(event: Event) -> None:
        if isinstance(event, Planned):
            say(event.line)

    return hear


def notes(say: Callable[[str], None]) -> Listener:
    """A listener that passes the line of each `Note` event to `say`, each line once."""
    said: set[str] = set()

    def hear(event: Event) -> None:
        if isinstance(event, Note) and event.line not in said:
            said.add(event.line)
            say(event.line)

    return hear
