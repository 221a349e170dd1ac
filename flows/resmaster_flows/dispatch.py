"""Shares the shards of a dataset among runs, and waits until they are committed.

Knows nothing about stages, stores or servers: `resmaster_flows.server_runs` brings the runs, the caller the look into
the store.

Invariants:
- A shard is finished when its commits are there, whoever made them, and missing when they are not, whatever a run's
  state says: a run that reads Running for ever costs `stall_seconds`, not the build.
- A shard at which `attempts` runs broke off is given up, and so is one that a run tried and could not finish: the same
  would happen again.
- At most `window` runs wait at a time: a worker asks for 200, and what lies behind them would starve.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import httpx
from prefect.client.schemas.objects import State
from prefect.states import Crashed

from resmaster_flows.outcome import INCOMPLETE
from resmaster_flows.watch.events import Dispatched, RunEnded, RunSubmitted
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.progress import emit

FRUITLESS_RUNS = 10
"""So many runs in a row that ended without a commit end the dispatch: something is wrong with all of them."""

OUTAGE_LOOKS = 40
"""So many looks in a row may find server or store out of reach (ten minutes at the default `poll_seconds`)."""

Shards = tuple[int, ...]


class Stopped(Exception):
    """The build was cancelled while it waited."""


class Runs(Protocol):
    """What the dispatch asks of a server."""

    def submit(self, shards: Shards, attempt: int) -> tuple[UUID, str]:
        """Start a run over the shards, or find the one that was started so. Its id and name."""

    def states(self, runs: Collection[UUID]) -> Mapping[UUID, State]:
        """The states of runs; deleted ones are absent. Raises Stopped if the build itself was cancelled."""

    def cancel(self, runs: Collection[UUID]) -> None:
        """Cancel those of the runs that have not ended."""

    def give_up(self, run: UUID, reason: str) -> None:
        """Mark a run of which nobody hears any more as crashed."""


@dataclass
class Child:
    """A run that was submitted and has not ended."""

    name: str
    shards: Shards
    lacking: int
    """Commits that its shards lacked when it was submitted."""
    left: int
    """Commits that they lacked at the last look."""
    heard: float
    """When it last committed something, or was still waiting: seconds of a monotonic clock."""
    waiting: bool = True


class Dispatch:
    """The state of one dispatch: batches of shards that are due, runs under way, and why shards were not finished."""

    def __init__(
        self, runs: Runs, config: DispatchConfig, shards: Iterable[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runs = runs
        self._config = config
        self._clock = clock
        ordered, size = sorted(shards), config.shards_per_run
        self.due: deque[Shards] = deque(tuple(ordered[i : i + size]) for i in range(0, len(ordered), size))
        self.active: dict[UUID, Child] = {}
        self.errors: dict[int, str] = {}
        self._broken_off: Counter[int] = Counter()
        self._fruitless = 0

    @property
    def waiting(self) -> list[UUID]:
        """The runs that no worker has begun."""
        return [run for run, child in self.active.items() if child.waiting]

    def settle(self, states: Mapping[UUID, State], todo: Mapping[int, int]) -> None:
        """Take note of `states` and of `todo` (shard -> commits that it lacks), which must be the later look."""
        for run, child in list(self.active.items()):
            state = states.get(run)
            unfinished = [shard for shard in child.shards if shard in todo]
            left = sum(todo[shard] for shard in unfinished)
            if state is not None and not state.is_final():
                child.waiting = state.is_scheduled() or state.is_pending()
                if left < child.left or state.is_scheduled():
                    child.left, child.heard = left, self._clock()
                if self._clock() - child.heard <= self._config.stall_seconds:
                    continue
                state = Crashed(message=f"no commit within {self._config.stall_seconds:g} s")
                self._runs.give_up(run, state.message or "")
            del self.active[run]
            emit(RunEnded(str(run), spell_state(state), finished=not unfinished))
            self._fruitless = self._fruitless + 1 if unfinished and left == child.lacking else 0
            self.errors.update(dict.fromkeys(unfinished, f"run {child.name}: {spell_state(state)}"))
            if state is not None and not state.is_cancelled() and state.name != INCOMPLETE:
                self._again(unfinished)

    def _again(self, unfinished: list[int]) -> None:
        """Runs go through their shards in order: the first one left is where it broke off, and may be the reason.

        So that one gets a run of its own, if any, and the others do not share its fate.
        """
        suspect, others = unfinished[:1], unfinished[1:]
        if others:
            self.due.appendleft(tuple(others))
        for shard in suspect:
            self._broken_off[shard] += 1
            if self._broken_off[shard] < self._config.attempts:
                self.due.append((shard,))

    def top_up(self, todo: Mapping[int, int]) -> None:
        """Submit what is due, as far as the window allows."""
        if self._fruitless >= FRUITLESS_RUNS:
            reason = f"not tried: the last {self._fruitless} runs ended without a commit"
            self.errors = {**{shard: reason for batch in self.due for shard in batch}, **self.errors}
            self.due.clear()
        room = self._config.window - len(self.waiting)
        while self.due and room > 0:
            shards = tuple(shard for shard in self.due[0] if shard in todo)
            if shards:
                run, name = self._runs.submit(shards, self._broken_off[shards[0]] + 1)
                lacking = sum(todo[shard] for shard in shards)
                self.active[run] = Child(name, shards, lacking, lacking, self._clock())
                emit(RunSubmitted(str(run), name))
                room -= 1
            self.due.popleft()  # only now: a server out of reach is asked again at the next look


def dispatch(
    runs: Runs,
    look: Callable[[], Mapping[int, int]],
    config: DispatchConfig,
    todo: Mapping[int, int],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, str]:
    """Have every shard of `todo` done by runs. Returns the shards that are missing in the end, and why.

    todo: shard -> commits that it lacks. `look` asks the store for the same again; finished shards are absent.
    Raises Stopped if the build was cancelled, the server's or the store's own error if they stay out of reach.
    """
    total, out_of_reach = len(todo), 0
    state = Dispatch(runs, config, todo, clock)
    try:
        while todo and (state.active or state.due):
            try:
                state.top_up(todo)
                running = len(state.active) - len(state.waiting)
                emit(Dispatched(total - len(todo), total, running, len(state.waiting)))
                sleep(config.poll_seconds)
                states = runs.states(state.active.keys())  # before the commits: those of an ended run must be seen
                todo = look()
                state.settle(states, todo)
                out_of_reach = 0
            except (httpx.HTTPError, ConnectionError, TimeoutError):
                out_of_reach += 1
                if out_of_reach == OUTAGE_LOOKS:
                    raise
                sleep(config.poll_seconds)
    except (KeyboardInterrupt, Stopped):
        runs.cancel(state.active.keys())
        raise
    emit(Dispatched(total - len(todo), total, 0, 0))
    runs.cancel(state.waiting)  # their shards were finished by others
    return {shard: state.errors.get(shard, "not tried") for shard in sorted(todo)}


def spell_state(state: State | None) -> str:
    """A run's last state in one line."""
    if state is None:
        return "deleted"
    message = " ".join((state.message or "").split())
    return f"{state.name}: {message}" if message else str(state.name)
