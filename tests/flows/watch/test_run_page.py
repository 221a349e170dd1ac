"""What a run's page says, without Prefect: the listening and the rendering."""

from typing import Any

import pytest

from resmaster_flows.watch.page import ROWS, RunPage
from resmaster_stages.progress import Both, Silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def work(page: RunPage, clock: Clock, stage: str, shard: int, samples: int, seconds: float, bad: int = 0) -> None:
    """One stage of one shard, `seconds` a sample, the first `bad` of which fail."""
    page.shard_started(stage, shard, samples)
    for number in range(samples):
        clock.now += seconds
        page.sample_done(stage, shard, ok=number >= bad)
    page.shard_done(stage, shard, cached=False)


def test_how_far_how_fast_and_how_long(clock: Clock) -> None:
    lines: list[str] = []
    page = RunPage({"low_res": 4, "high_res": 4}, [0, 1], lines.append, clock=clock)
    assert page.percent == 0
    assert page.headline() == "0 of 4 images; time left: estimating; starting"
    work(page, clock, "low_res", 0, 2, 1.0)
    assert page.percent == 25
    page.shard_started("high_res", 0, 2)
    page.step(3, 20)
    assert page.headline().endswith("; shard 000000: upscaling, step 3 of 20")
    work(page, clock, "high_res", 0, 2, 10.0, bad=1)
    assert page.percent == 50
    assert page.seconds_left == pytest.approx(2 * 1.0 + 2 * 10.0)
    assert page.headline().startswith("1 of 4 images; 0.0455 images per second; time left: 22 s; 1 samples failed; ")
    assert page.table() == [
        {"shard": "000000", "state": "finished", "seconds": 22.0, "failed samples": 1},
        {"shard": "000001", "state": "waiting", "seconds": 0.0, "failed samples": 0},
    ]
    assert lines == ["shard 000000: low_res committed in 2 s", "shard 000000: high_res committed in 20 s"]
    page.shard_started("low_res", 1, 2)
    page.shard_failed(1, "low_res: 2 of 2 samples failed")
    assert page.table()[0]["state"] == "failed: low_res: 2 of 2 samples failed", "what needs attention comes first"
    assert lines[-1] == "shard 000001 failed: low_res: 2 of 2 samples failed"
    assert page.percent == 50, "a run that could not finish never reads 100"


def test_shards_that_others_finished_count_as_done(clock: Clock) -> None:
    page = RunPage({"low_res": 2, "high_res": 2}, [0], clock=clock)
    for stage in ("low_res", "high_res"):
        page.shard_done(stage, 0, cached=True)
    assert page.percent == 100
    assert "took" in page.headline()


def test_a_repeated_attempt_never_passes_100(clock: Clock) -> None:
    page = RunPage({"high_res": 2}, [0, 1], clock=clock)
    for _ in range(3):
        work(page, clock, "high_res", 0, 2, 1.0)
    assert page.percent == 100


def test_work_that_is_done_by_other_runs(clock: Clock) -> None:
    page = RunPage({"high_res": 80}, range(20), link=lambda run: f"http://server/{run}", clock=clock)
    page.run_submitted("a", "demo: shards 0-9")
    page.run_submitted("b", "demo: shards 10-19")
    page.dispatched(0, 20, 2, 0)
    assert page.seconds_left is None
    clock.now = 40.0
    page.dispatched(5, 20, 2, 0)
    assert page.percent == 25
    assert page.headline() == (
        "5 of 20 shards; about 0.5 images per second; time left: 2 min 00 s; 2 runs at work, 0 waiting"
    )
    page.run_ended("b", "Crashed: no commit within 3600 s", finished=False)
    assert page.table() == [
        {"run": "demo: shards 10-19", "state": "Crashed: no commit within 3600 s", "link": "http://server/b"},
        {"run": "demo: shards 0-9", "state": "submitted", "link": "http://server/a"},
    ]


def test_a_table_of_a_large_dataset_is_cut_and_says_so(clock: Clock) -> None:
    page = RunPage({"high_res": 5000}, range(5000), clock=clock)
    page.shard_failed(4321, "lost")
    table = page.table()
    assert len(table) == ROWS + 1
    assert table[0]["shard"] == "004321"
    assert table[-1] == {"shard": f"and {5000 - ROWS} more"}


def test_nothing_to_do(clock: Clock) -> None:
    page = RunPage({}, [], clock=clock)
    assert page.percent == 100
    assert page.table() == []


def test_both_hear_everything() -> None:
    """Whatever a Reporter can hear, so that a new event is not forgotten."""
    heard: list[tuple[str, str]] = []
    events = [name for name in vars(Silent) if not name.startswith("_")]

    class Listener:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, event: str) -> Any:
            return lambda *args, **kwargs: heard.append((self.name, event))

    both = Both(Listener("first"), Listener("second"))
    for event in events:
        method = getattr(both, event)
        method(*range(method.__code__.co_argcount - 1))
    assert heard == [(name, event) for event in events for name in ("first", "second")]
