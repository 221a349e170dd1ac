"""The dispatch without a server: runs that end, break off, stall or vanish, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running, Scheduled, Suspended

from resmaster_flows.dispatch import FRUITLESS_RUNS, OUTAGE_LOOKS, Shards, Stopped, batches, dispatch
from resmaster_flows.outcome import incomplete, limited
from resmaster_flows.process import run_name
from resmaster_flows.selection import parse_numbers, spell_shards
from resmaster_flows.watch.decisions import LINES_OF_A_KIND, decisions
from resmaster_flows.watch.progress import Progress
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.progress import listening

STAGES = 4


class World:
    """A store and a server with `workers` workers, moved on by `sleep`: each run does one shard per sleep."""

    def __init__(self, shards: int, workers: int = 2) -> None:
        self.lacking = dict.fromkeys(range(shards), STAGES)
        self.workers = workers
        self.known_places = 1
        self.seconds = 0.0
        self.submitted: list[tuple[Shards, int]] = []
        self.runs: dict[UUID, tuple[Shards, State]] = {}
        self.most_waiting = 0
        self.given_up: list[str] = []
        self.progress = Progress()
        self.lines: list[str] = []
        """What the log of the build says."""
        self.on_shard: Callable[[UUID, int], State | None] = lambda run, shard: None
        """Called before a run does a shard; a state ends the run there."""
        self.reached = ""
        """The limit that is reached."""

    def places(self) -> int:
        return self.known_places

    def begun(self) -> Mapping[UUID, tuple[str, Shards]]:
        return {run: ("earlier", shards) for run, (shards, state) in self.runs.items() if not state.is_final()}

    def look(self) -> Mapping[int, int]:
        return {shard: left for shard, left in self.lacking.items() if left}

    def submit(self, shards: Shards, attempt: int) -> tuple[UUID, str]:
        run = uuid4()
        self.submitted.append((shards, attempt))
        self.runs[run] = (shards, Scheduled())
        waiting = [state for _, state in self.runs.values() if state.is_scheduled()]
        self.most_waiting = max(self.most_waiting, len(waiting))
        return run, f"run-{len(self.submitted)}"

    def limit(self) -> str:
        return self.reached

    def address(self, run: UUID) -> str:
        return f"http://server/{list(self.runs).index(run)}"

    def states(self, runs: Collection[UUID]) -> Mapping[UUID, State]:
        return {run: self.runs[run][1] for run in runs if run in self.runs}

    def cancel(self, runs: Collection[UUID]) -> None:
        for run in runs:
            self.runs[run] = (self.runs[run][0], Cancelled())

    def give_up(self, run: UUID, reason: str) -> None:
        self.given_up.append(reason)
        self.runs[run] = (self.runs[run][0], Crashed(message=reason))

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        for run, (shards, state) in list(self.runs.items()):
            busy = sum(each.is_running() for _, each in self.runs.values())
            if state.is_scheduled() and busy < self.workers:
                self.runs[run] = (shards, Running())
            elif state.is_running():
                todo = [shard for shard in shards if self.lacking[shard]]
                end = self.on_shard(run, todo[0]) if todo else Completed()
                if end is None:
                    self.lacking[todo[0]] = 0
                elif run in self.runs:
                    self.runs[run] = (shards, end)

    def dispatch(self, **config: float) -> dict[int, str]:
        settings = DispatchConfig.model_validate({"poll_seconds": 1, **config})
        with listening(self.progress.hear), listening(decisions(self.lines.append)):
            return dispatch(self, self.look, settings, self.look(), sleep=self.sleep, clock=lambda: self.seconds)

    def table(self) -> list[str]:
        """The states that the page of the build shows at last: of each run, in the order of their submission."""
        return [run.state for run in self.progress.runs.values()]


def test_every_shard_is_given_to_one_run_and_the_window_holds() -> None:
    world = World(100)
    assert world.dispatch(shards_per_run=3, window=5) == {}
    assert [attempt for _, attempt in world.submitted] == [1] * 34
    assert sorted(shard for shards, _ in world.submitted for shard in shards) == list(range(100))
    assert world.most_waiting == 5


def test_what_is_committed_already_is_not_dispatched() -> None:
    world = World(10)
    world.lacking |= dict.fromkeys(range(0, 10, 2), 0)
    assert world.dispatch(shards_per_run=2) == {}
    assert [shards for shards, _ in world.submitted] == [(1, 3), (5, 7), (9,)]
    assert World(0).dispatch() == {}


def test_a_shard_that_kills_its_runs_is_given_up_and_takes_no_other_with_it() -> None:
    world = World(8)
    world.on_shard = lambda run, shard: Crashed(message="exit code -9") if shard == 2 else None
    missing = world.dispatch(shards_per_run=4, attempts=3)
    assert set(missing) == {2}
    assert missing[2].startswith("run run-")
    assert missing[2].endswith("Crashed: exit code -9")
    assert [(shards, attempt) for shards, attempt in world.submitted if 2 in shards] == [
        ((0, 1, 2, 3), 1),
        ((2,), 2),
        ((2,), 3),
    ]
    assert ((3,), 1) in world.submitted


def test_what_a_run_tried_in_vain_is_not_tried_again() -> None:
    world = World(4)
    world.on_shard = lambda run, shard: incomplete("shards 0 not finished", {}) if shard == 0 else None
    missing = world.dispatch(shards_per_run=1)
    assert missing == {0: "run run-1: Incomplete: shards 0 not finished"}
    assert len(world.submitted) == 4


@pytest.mark.parametrize("end", [Cancelled(), None], ids=["cancelled", "deleted"])
def test_a_run_that_somebody_took_away_is_not_started_again(end: State | None) -> None:
    world = World(2)

    def take_away(run: UUID, shard: int) -> State | None:
        if shard == 0 and end is None:
            del world.runs[run]
            return Completed()
        return end if shard == 0 else None

    world.on_shard = take_away
    assert set(world.dispatch(shards_per_run=1)) == {0}
    assert len(world.submitted) == 2


def test_a_run_that_reads_running_for_ever_is_given_up() -> None:
    world = World(4, workers=3)
    dead: list[UUID] = []

    def hang(run: UUID, shard: int) -> State | None:
        if not dead:
            dead.append(run)
        return Running() if run in dead else None

    world.on_shard = hang
    assert world.dispatch(shards_per_run=2, stall_seconds=20) == {}
    assert world.given_up == ["no commit within 20 s"]
    assert world.seconds > 20


def test_commits_count_whoever_made_them() -> None:
    world = World(6, workers=0)

    def others(seconds: float) -> None:
        world.seconds += seconds
        world.lacking[int(world.seconds) - 1] = 0

    settings = DispatchConfig(poll_seconds=1, shards_per_run=2)
    assert dispatch(world, world.look, settings, world.look(), sleep=others, clock=lambda: world.seconds) == {}
    assert all(state.is_cancelled() for _, state in world.runs.values()), "nobody needs to start them any more"


def test_a_waiting_run_may_wait_for_ever() -> None:
    world = World(1, workers=0)
    original = world.sleep

    def sleep(seconds: float) -> None:
        original(seconds)
        if world.seconds > 1000:
            world.workers = 1

    settings = DispatchConfig(poll_seconds=1, stall_seconds=10)
    assert dispatch(world, world.look, settings, world.look(), sleep=sleep, clock=lambda: world.seconds) == {}
    assert world.given_up == []


def test_runs_that_all_fail_end_the_dispatch() -> None:
    world = World(1000)
    world.on_shard = lambda run, shard: Failed(message="wrong model")
    missing = world.dispatch(shards_per_run=1, window=2)
    assert len(missing) == 1000
    assert len(world.submitted) <= FRUITLESS_RUNS + 4
    assert sum("wrong model" in error for error in missing.values()) >= FRUITLESS_RUNS
    assert missing[999] == f"not tried: the last {FRUITLESS_RUNS} runs ended without a commit"


def test_an_outage_is_sat_out_and_a_long_one_is_told() -> None:
    world = World(3)
    calls = iter(range(10_000))
    states = world.states
    down = range(2, 2 + OUTAGE_LOOKS - 1)

    def flaky(runs: Collection[UUID]) -> Mapping[UUID, State]:
        if next(calls) in down:
            raise httpx.ConnectError("no server")
        return states(runs)

    world.states = flaky  # type: ignore[method-assign]
    assert world.dispatch(shards_per_run=1) == {}
    down = range(10_000)
    world.lacking[0] = 1
    with pytest.raises(httpx.ConnectError):
        world.dispatch(shards_per_run=1)


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt])
def test_a_build_that_is_stopped_cancels_its_runs(stop: type[BaseException]) -> None:
    world = World(10)
    original = world.sleep

    def sleep(seconds: float) -> None:
        original(seconds)
        if world.seconds > 3:
            raise stop

    with pytest.raises(stop):
        dispatch(world, world.look, DispatchConfig(poll_seconds=1, shards_per_run=2), world.look(), sleep=sleep)
    assert world.runs
    assert all(state.is_final() for _, state in world.runs.values())


def test_pending_runs_count_as_waiting_but_not_for_ever() -> None:
    world = World(2, workers=0)

    def sleep(seconds: float) -> None:
        world.seconds += seconds
        for run, (shards, state) in world.runs.items():
            if state.is_scheduled():
                world.runs[run] = (shards, Pending())

    settings = DispatchConfig(poll_seconds=1, shards_per_run=2, stall_seconds=5, attempts=2)
    missing = dispatch(world, world.look, settings, world.look(), sleep=sleep, clock=lambda: world.seconds)
    assert set(missing) == {0, 1}
    assert [shards for shards, _ in world.submitted] == [(0, 1), (1,), (0,), (1,)]


def test_shards_are_spelled_as_they_are_read() -> None:
    for numbers in ([0], [0, 1, 2], [1, 4, 5, 6, 7, 9], [3, 5]):
        assert parse_numbers(spell_shards(numbers), 10**9) == numbers
    assert spell_shards([7, 1, 4, 6, 5, 1]) == "1,4-7"


def test_runs_are_named_by_dataset_stages_and_shards() -> None:
    assert run_name("s3://bucket/sets/demo", [0, 1, 2, 7]) == "demo: shards 0-2,7"
    assert run_name("/data/demo/", [3], ["captions", "quality"]) == "demo: captions,quality of shards 3"
    name = run_name("/data/demo", range(0, 2000, 2))
    assert name.startswith("demo: shards 0,2,4,")
    assert name.endswith(",... (1000 in all)")
    assert len(name) < 100


# ----------------------------------------------------------------------------------------------------------------------
# how the shards are divided


def test_every_worker_online_gets_work() -> None:
    world = World(3)
    world.known_places = 2
    assert world.dispatch(shards_per_run=8) == {}
    assert [shards for shards, _ in world.submitted] == [(0, 1), (2,)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 1000), st.integers(1, 50))
def test_batches_are_as_large_as_allowed_and_leave_no_worker_idle(shards: int, largest: int, places: int) -> None:
    found = batches(range(shards), largest, places)
    assert [shard for batch in found for shard in batch] == list(range(shards))
    assert all(1 <= len(batch) <= largest for batch in found)
    size = max(map(len, found), default=0)
    assert size * places >= shards or size == largest, "not smaller than the workers ask for"
    assert size < 2 or (size - 1) * places < shards, "not larger, either"


# ----------------------------------------------------------------------------------------------------------------------
# what the page of the build shows at last


def test_at_the_end_every_run_shows_its_final_state() -> None:
    world = World(5, workers=1)
    world.on_shard = lambda run, shard: incomplete("shards 4 not finished", {}) if shard == 4 else None
    assert set(world.dispatch(shards_per_run=2)) == {4}
    assert world.table() == ["Completed", "Completed", "Incomplete: shards 4 not finished"]
    assert world.progress.dispatched is not None
    assert (world.progress.dispatched.done, world.progress.dispatched.running) == (4, 0)


def test_runs_that_are_needed_no_more_show_that_they_were_cancelled() -> None:
    world = World(4, workers=1)

    def others(run: UUID, shard: int) -> State | None:
        world.lacking = dict.fromkeys(world.lacking, 0)
        return None

    world.on_shard = others
    assert world.dispatch(shards_per_run=1) == {}
    assert world.table() == ["Completed", "Cancelled", "Cancelled", "Cancelled"]


def test_a_run_that_never_ends_does_not_hold_the_build_and_shows_where_it_stood() -> None:
    world = World(2, workers=1)

    def hang(run: UUID, shard: int) -> State | None:
        world.lacking = dict.fromkeys(world.lacking, 0)
        return Running()

    world.on_shard = hang
    original = world.states
    world.states = lambda runs: {run: Running() for run in original(runs)}  # type: ignore[method-assign]
    assert world.dispatch(shards_per_run=2) == {}
    assert world.table() == ["at work when the build ended"]


def stopped_after(world: World, seconds: float, stop: BaseException) -> None:
    """Let the server answer with `stop` to each question after some time."""
    original = world.states

    def states(runs: Collection[UUID]) -> Mapping[UUID, State]:
        if world.seconds >= seconds:
            raise stop
        return original(runs)

    world.states = states  # type: ignore[method-assign]


def test_a_cancelled_build_shows_its_runs_as_cancelled() -> None:
    world = World(10)
    stopped_after(world, 3, Stopped())
    with pytest.raises(Stopped):
        world.dispatch(shards_per_run=2)
    assert world.table()[-3:] == ["Cancelled"] * 3
    assert "submitted" not in world.table()
    assert all(state.is_final() for _, state in world.runs.values())


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_signal_cancels_the_runs_only_of_a_cancelled_build(cancelled: bool) -> None:
    """A worker that is stopped, or a machine that is taken away, ends the build's process alike."""
    world = World(10)
    original = world.sleep

    def sleep(seconds: float) -> None:
        original(seconds)
        if world.seconds >= 3:
            if cancelled:
                stopped_after(world, 0, Stopped())
            raise TerminationSignal(15)

    world.sleep = sleep  # type: ignore[method-assign]
    with pytest.raises(TerminationSignal):
        world.dispatch(shards_per_run=2)
    assert "submitted" not in world.table()
    left = [state for _, state in world.runs.values() if not state.is_final()]
    assert not left if cancelled else left


# ----------------------------------------------------------------------------------------------------------------------
# suspended and resumed


def test_a_suspended_build_leaves_the_runs_at_work_and_a_resumed_one_goes_on_with_them() -> None:
    world = World(8)
    stopped_after(world, 2, Pause(state=Suspended()))
    with pytest.raises(Pause):
        world.dispatch(shards_per_run=2)
    states = [state for _, state in world.runs.values()]
    assert [state.is_running() for state in states] == [True, True, False, False]
    assert world.table() == ["at work when the build ended"] * 2 + ["Cancelled"] * 2

    del world.states
    world.submitted.clear()
    assert world.dispatch(shards_per_run=2) == {}
    assert [shards for shards, _ in world.submitted] == [(4, 5), (6, 7)], "the others are at work"


def test_a_process_that_another_one_has_replaced_cancels_nothing() -> None:
    world = World(8)
    stopped_after(world, 2, Pause(state=Running()))
    with pytest.raises(Pause):
        world.dispatch(shards_per_run=2)
    assert not any(state.is_final() for _, state in world.runs.values())


def test_a_limit_ends_the_dispatch_with_the_shards_at_work() -> None:
    """Runs at work end with their shard, waiting runs are cancelled, and the shards that are left are no errors."""
    world = World(40, workers=3)

    def end_at_limit(run: UUID, shard: int) -> State | None:
        done = sum(not left for left in world.lacking.values())
        world.reached = world.reached or ("the budget is spent" if done >= 10 else "")
        return limited(world.reached, {}) if world.reached else None

    world.on_shard = end_at_limit
    assert world.dispatch(shards_per_run=4, window=5) == {}
    finished = sum(not left for left in world.lacking.values())
    assert 10 <= finished < 10 + 3, "three runs were at work"
    assert {state.split(":")[0] for state in world.table()} == {"Completed", "Limited", "Cancelled"}
    assert all(state.is_final() for _, state in world.runs.values())


def test_a_run_that_knows_of_a_limit_ends_the_dispatch() -> None:
    """Its clock may be ahead of the build's."""
    world = World(4, workers=1)
    world.on_shard = lambda run, shard: limited("the hours are over", {}) if shard == 1 else None
    assert world.dispatch(shards_per_run=4) == {}
    assert world.look().keys() == {1, 2, 3}
    assert len(world.submitted) == 1


def test_a_limit_excuses_no_error() -> None:
    world = World(6, workers=1)

    def on_shard(run: UUID, shard: int) -> State | None:
        if shard == 1:
            world.reached = "the budget is spent"
            return incomplete("shards 1 not finished", {"1": "broken"})
        return None

    world.on_shard = on_shard
    errors = world.dispatch(shards_per_run=2)
    assert errors.keys() == {1}
    assert "Incomplete" in errors[1]


# ----------------------------------------------------------------------------------------------------------------------
# what the log of the build says


def test_the_log_tells_what_was_submitted_and_how_far_it_is() -> None:
    world = World(4)
    world.known_places = 2
    assert world.dispatch() == {}
    assert world.lines == [
        "4 shards go to 2 runs of at most 2 shards; 2 runs can be at work at a time",
        "submitted run-1: http://server/0",
        "submitted run-2: http://server/1",
        "0 of 4 shards finished; 0 runs at work, 2 waiting",
        "0 of 4 shards finished; 2 runs at work, 0 waiting",
        "2 of 4 shards finished; 2 runs at work, 0 waiting",
        "4 of 4 shards finished; 0 runs at work, 0 waiting",
    ]


def test_the_log_tells_of_a_crash_and_what_becomes_of_its_shards() -> None:
    world = World(3)
    world.on_shard = lambda run, shard: Crashed(message="exit code -9") if shard == 0 else None
    world.dispatch(attempts=2)
    assert [line for line in world.lines if "broke off" in line] == [
        "run-1: broke off (Crashed: exit code -9); shard 0, at which it broke off, gets a run of its own "
        "(attempt 2 of 2); shards 1-2 dispatched anew",
        "run-3: broke off (Crashed: exit code -9); shard 0 given up, because 2 runs broke off at it",
    ]
    assert "submitted run-3: http://server/2" in world.lines


def test_the_log_tells_why_shards_are_given_up() -> None:
    world = World(4)
    ends = {0: incomplete("shards 0 not finished; first: low_res: no", {}), 1: Cancelled()}
    world.on_shard = lambda run, shard: ends.get(shard)
    world.dispatch(shards_per_run=1)
    assert [line for line in world.lines if "given up" in line] == [
        "run-1: shard 0 given up, because another run would end the same way "
        "(Incomplete: shards 0 not finished; first: low_res: no)",
        "run-2: shard 1 given up, because another run would end the same way (Cancelled)",
    ]


def test_the_log_tells_what_is_cancelled_and_why() -> None:
    world = World(6)
    stopped_after(world, 2, Stopped())
    with pytest.raises(Stopped):
        world.dispatch(shards_per_run=2)
    assert "cancelled 3 runs, because the build was cancelled" in world.lines
    later = World(6, workers=1)
    stopped_after(later, 2, Pause(state=Suspended()))
    with pytest.raises(Pause):
        later.dispatch(shards_per_run=2)
    assert "cancelled 2 runs, because the build is suspended; runs at work end their shards" in later.lines


def test_the_log_tells_of_an_outage_and_its_end() -> None:
    world = World(2)
    states, answers = world.states, iter([True, False, False, True, *[True] * 20])

    def flaky(runs: Collection[UUID]) -> Mapping[UUID, State]:
        if not next(answers):
            raise httpx.ConnectError("no server")
        return states(runs)

    world.states = flaky  # type: ignore[method-assign]
    world.dispatch(shards_per_run=1)
    told = [line for line in world.lines if "server" in line and "http" not in line]
    assert told == [
        "server or store out of reach, asked again: ConnectError: no server",
        "server and store answer again",
    ]


@pytest.mark.parametrize("crash", [False, True])
def test_the_log_of_a_large_build_is_short(crash: bool) -> None:
    world = World(1000, workers=50)
    tried: set[int] = set()

    def first_time(run: UUID, shard: int) -> State | None:
        if not crash or shard in tried or shard % 20:
            return None
        tried.add(shard)
        return Crashed(message="exit code -9")

    world.on_shard = first_time
    assert world.dispatch(shards_per_run=1) == {}
    assert len(world.lines) < 3 * (LINES_OF_A_KIND + 1) + 20
    assert "more lines about submitted runs are left out; the table of the build's page has every run" in world.lines
    assert world.lines[-1] == "1000 of 1000 shards finished; 0 runs at work, 0 waiting"
