"""Distributes the shards of a dataset over flow runs, and waits until the shards are committed.

A run here is a flow run of `process-shards` over some shards. This module does not talk to a server or a store:
`resmaster_flows.server_runs` starts the runs, and the caller passes a function that reads the store.

Invariants:
- A shard is finished when its commits exist, whichever run made them, and missing when they do not. The state of a run
  does not matter: a run that stays Running for ever delays the build by `stall_seconds`, but does not block it.
- A shard is given up after `attempts` runs have broken off at it. A shard that a run tried and could not finish is
  given up at once, because the next run would fail the same way.
- When a limit of the build is reached, no more runs are submitted, and those that wait are cancelled. Runs at work look
  at the limit themselves, and end with the shard that they are at.
- At most `window` runs wait at a time. A worker fetches at most 200 waiting runs, so runs behind those would starve.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import httpx
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Crashed

from resmaster_flows.outcome import INCOMPLETE, LIMITED
from resmaster_flows.selection import spell_shards
from resmaster_flows.watch.events import Decision, Dispatched, RunEnded, RunSubmitted
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.progress import emit
from resmaster_stages.runner.shards import describe

FRUITLESS_RUNS = 10
"""The dispatch ends after this many runs in a row without a commit, because all runs seem to have the same fault."""

OUTAGE_LOOKS = 40
"""The dispatch ends after this many failed looks at server or store in a row: after 10 to 20 minutes at the default
`poll_seconds`, because a failed look waits once or twice."""

LAST_LOOKS = 10
"""When nothing is left to do, the dispatch looks this often at most for the final states of its runs."""
LAST_SECONDS = 1.0
"""Maximum time between two of these looks."""

SUBMITTED, BROKEN, GIVEN_UP, OUTAGES = "submitted runs", "runs that broke off", "shards given up", "outages"
"""Kinds of decisions."""

Shards = tuple[int, ...]


class Stopped(Exception):
    """Raised when the build is cancelled while it waits."""


class Runs(Protocol):
    """What the dispatch needs from a server."""

    def places(self) -> int:
        """How many runs can be at work at the same time, as far as the server knows; at least 1."""

    def begun(self) -> Mapping[UUID, tuple[str, Shards]]:
        """The runs that an earlier process of this build left waiting or at work: run -> name, shards."""

    def submit(self, shards: Shards, attempt: int) -> tuple[UUID, str]:
        """Start a run over the shards, or find the run that was already started for this attempt. Returns id, name."""

    def limit(self) -> str:
        """Which limit of the build is reached, in words; "" if none is."""

    def address(self, run: UUID) -> str:
        """The address of a run's page."""

    def states(self, runs: Collection[UUID]) -> Mapping[UUID, State]:
        """Run -> state. Deleted runs are absent.

        Raises Stopped if the build itself was cancelled, and Prefect's Pause if it was suspended, or was resumed in
        another process since then.
        """

    def cancel(self, runs: Collection[UUID]) -> None:
        """Cancel those of the runs that have not ended."""

    def give_up(self, run: UUID, reason: str) -> None:
        """Mark a run that no longer makes progress as crashed."""


@dataclass
class Child:
    """A run that was submitted and has not ended."""

    name: str
    shards: Shards
    lacking: int
    """Commits that its shards lacked when the run was submitted."""
    left: int
    """Commits that its shards lacked at the last look."""
    heard: float
    """When the run last committed something or was still waiting, in seconds of a monotonic clock."""
    waiting: bool = True


class Dispatch:
    """The state of one dispatch: batches of shards to submit, active runs, and the error of each unfinished shard."""

    def __init__(
        self,
        runs: Runs,
        config: DispatchConfig,
        todo: Mapping[int, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs = runs
        self._config = config
        self._clock = clock
        self.active: dict[UUID, Child] = {}
        self.errors: dict[int, str] = {}
        self.limited = False
        """Whether a limit of the build is reached, so that nothing more is submitted."""
        self._broken_off: Counter[int] = Counter()
        self._fruitless = 0
        begun = runs.begun()
        for run, (name, shards) in begun.items():
            self._watch(run, name, shards, todo)
        taken = {shard for _, shards in begun.values() for shard in shards}
        left, places = sorted(todo.keys() - taken), runs.places()
        self.due = deque(batches(left, config.shards_per_run, places))
        if begun:
            emit(Decision(f"{_count(len(begun), 'run')} of this build go on that were started before"))
        if left:
            emit(
                Decision(
                    f"{_count(len(left), 'shard')} go to {_count(len(self.due), 'run')} of at most "
                    f"{_count(len(self.due[0]), 'shard')}; {_count(places, 'run')} can be at work at a time"
                )
            )

    def _watch(self, run: UUID, name: str, shards: Shards, todo: Mapping[int, int]) -> None:
        lacking = sum(todo.get(shard, 0) for shard in shards)
        self.active[run] = Child(name, shards, lacking, lacking, self._clock())
        emit(RunSubmitted(str(run), name, shards, self._runs.address(run)))

    @property
    def waiting(self) -> list[UUID]:
        """The runs that no worker has started."""
        return [run for run, child in self.active.items() if child.waiting]

    def settle(self, states: Mapping[UUID, State], todo: Mapping[int, int]) -> None:
        """Update the dispatch from the runs' `states` and from `todo` (shard -> commits that the shard lacks).

        `todo` must have been read after `states`.
        """
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
            if state is not None and state.name == LIMITED:
                self.limited = True
                continue
            self.errors.update(dict.fromkeys(unfinished, f"run {child.name}: {spell_state(state)}"))
            if not unfinished:
                continue
            if state is not None and not state.is_cancelled() and state.name != INCOMPLETE:
                emit(Decision(f"{child.name}: broke off ({spell_state(state)}); {self._again(unfinished)}", BROKEN))
            else:
                given_up = f"{_shards(unfinished)} given up, because another run would end the same way"
                emit(Decision(f"{child.name}: {given_up} ({spell_state(state)})", GIVEN_UP))

    def _again(self, unfinished: list[int]) -> str:
        """Schedule the unfinished shards of a run that broke off. Returns what becomes of them, in words.

        A run goes through its shards in order, so it broke off at the first unfinished shard, which may be the cause.
        That shard gets a run of its own, so that the other shards do not fail with it.
        """
        suspect, others = unfinished[0], unfinished[1:]
        if others:
            self.due.appendleft(tuple(others))
        self._broken_off[suspect] += 1
        times, most = self._broken_off[suspect], self._config.attempts
        if times < most:
            self.due.append((suspect,))
            told = f"shard {suspect}, at which it broke off, gets a run of its own (attempt {times + 1} of {most})"
        else:
            told = f"shard {suspect} given up, because {_count(times, 'run')} broke off at it"
        return f"{told}; {_shards(others)} dispatched anew" if others else told

    def top_up(self, todo: Mapping[int, int]) -> None:
        """Submit due batches, as far as the window and the limits of the build allow."""
        self.limited = self.limited or bool(self._runs.limit())
        if self.limited:
            self.due.clear()
            self.cancel(self.waiting, "a limit of the build is reached")
        if self._fruitless >= FRUITLESS_RUNS:
            reason = f"not tried: the last {self._fruitless} runs ended without a commit"
            untried = [shard for batch in self.due for shard in batch]
            self.errors = {**dict.fromkeys(untried, reason), **self.errors}
            self.due.clear()
            if untried:
                emit(Decision(f"{_count(len(untried), 'shard')} {reason}, so all runs seem to have the same fault"))
        room = self._config.window - len(self.waiting)
        while self.due and room > 0:
            shards = tuple(shard for shard in self.due[0] if shard in todo)
            if shards:
                run, name = self._runs.submit(shards, self._broken_off[shards[0]] + 1)
                self._watch(run, name, shards, todo)
                emit(Decision(f"submitted {name}: {self._runs.address(run)}", SUBMITTED))
                room -= 1
            self.due.popleft()  # last: if `submit` raised, the batch stays due

    def count(self, done: int, total: int) -> None:
        """Tell how many shards are done, and how many runs are at work and waiting."""
        waiting = len(self.waiting)
        emit(Dispatched(done, total, len(self.active) - waiting, waiting))

    def cancel(self, runs: Iterable[UUID], why: str) -> None:
        """Cancel active runs and watch them no longer."""
        chosen = list(runs)
        self._runs.cancel(chosen)
        if chosen:
            emit(Decision(f"cancelled {_count(len(chosen), 'run')}, because {why}"))
        for run in chosen:
            self._tell(run, "Cancelled")

    def _tell(self, run: UUID, state: str) -> None:
        """Tell the last state of an active run, which is watched no longer."""
        finished = self.active.pop(run).left == 0
        emit(RunEnded(str(run), state, finished))

    def leave(self) -> None:
        """Tell of the active runs that they go on without the build."""
        for run, child in list(self.active.items()):
            self._tell(run, f"{'waiting' if child.waiting else 'at work'} when the build ended")

    def close(self, sleep: Callable[[float], None]) -> None:
        """Tell the final states of the runs that are left when every shard is finished or given up.

        Waiting runs are cancelled. Runs at work find their shards finished and end by themselves.
        """
        for child in self.active.values():
            child.left = 0
        self.cancel(self.waiting, "no shard is left for them")
        for _ in range(LAST_LOOKS):
            if not self.active:
                return
            sleep(min(self._config.poll_seconds, LAST_SECONDS))
            with suppress(httpx.HTTPError):  # the work is done, and the next look may succeed
                for run, state in self._runs.states(self.active.keys()).items():
                    if state.is_final():
                        self._tell(run, spell_state(state))


def dispatch(
    runs: Runs,
    look: Callable[[], Mapping[int, int]],
    config: DispatchConfig,
    todo: Mapping[int, int],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, str]:
    """Have runs process every shard of `todo`. Returns shard -> reason, for the shards that are missing at the end, but
    for those that a limit of the build left out.

    todo: shard -> commits that the shard lacks. look: reads the same from the store again; finished shards are absent.
    Raises Stopped or Pause (see `Runs.states`), and the server's or store's own error if it stays out of reach.
    """
    total, out_of_reach = len(todo), 0
    state = Dispatch(runs, config, todo, clock)
    try:
        while todo and (state.active or state.due):
            try:
                state.top_up(todo)
                state.count(total - len(todo), total)
                sleep(config.poll_seconds)
                states = runs.states(state.active.keys())  # before `look`: it must see the commits of an ended run
                todo = look()
                state.settle(states, todo)
                if out_of_reach:
                    emit(Decision("server and store answer again", OUTAGES))
                out_of_reach = 0
            except (httpx.HTTPError, ConnectionError, TimeoutError) as error:
                out_of_reach += 1
                if out_of_reach == OUTAGE_LOOKS:
                    raise
                if out_of_reach == 1:
                    emit(Decision(f"server or store out of reach, asked again: {describe(error)}", OUTAGES))
                sleep(config.poll_seconds)
        state.close(sleep)
    except (KeyboardInterrupt, Stopped):
        state.cancel(state.active, "the build was cancelled")
        raise
    except Pause as pause:  # runs at work end their shards; the process that goes on with the build finds these runs
        if pause.state is None or pause.state.is_paused():  # else the build goes on already
            state.cancel(state.waiting, "the build is suspended; runs at work end their shards")
        raise
    except TerminationSignal:
        if _cancelled(runs):
            state.cancel(state.active, "the build was cancelled")
        raise
    finally:
        state.count(total - len(todo), total)
        state.leave()
    missing = [shard for shard in sorted(todo) if shard in state.errors or not state.limited]
    return {shard: state.errors.get(shard, "not tried") for shard in missing}


def batches(shards: Sequence[int], largest: int, places: int) -> list[Shards]:
    """The shards in order, in batches of at most `largest`, small enough that each of `places` gets one."""
    size = max(1, min(largest, math.ceil(len(shards) / places)))
    return [tuple(shards[first : first + size]) for first in range(0, len(shards), size)]


def _cancelled(runs: Runs) -> bool:
    """Whether the build's process is ended because the build was cancelled (and not its worker stopped)."""
    try:
        runs.states(())
    except Stopped:
        return True
    return False


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shards(numbers: Sequence[int]) -> str:
    return f"shard{'s' if len(numbers) > 1 else ''} {spell_shards(numbers)}"


def spell_state(state: State | None) -> str:
    """The last state of a run in one line."""
    if state is None:
        return "deleted"
    message = " ".join((state.message or "").split())
    return f"{state.name}: {message}" if message else str(state.name)
