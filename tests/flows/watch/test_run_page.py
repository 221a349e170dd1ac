"""What a run's page says, without Prefect: the listening and the rendering."""

import pytest

from resmaster_flows.watch.events import Dispatched, RunEnded, RunSubmitted, ShardFinished, WorkFound
from resmaster_flows.watch.page import ROWS, headline, lines, table
from resmaster_flows.watch.progress import Progress
from resmaster_stages.progress import Event, SampleDone, ShardDone, ShardFailed, ShardStarted, Step, emit, listening


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def hear(progress: Progress, *events: Event) -> None:
    for event in events:
        progress.hear(event)


def work(progress: Progress, clock: Clock, stage: str, shard: int, samples: int, seconds: float, bad: int = 0) -> None:
    """One stage of one shard, `seconds` a sample, the first `bad` of which fail."""
    with listening(progress.hear):
        emit(ShardStarted(stage, shard, samples))
        for number in range(samples):
            clock.now += seconds
            emit(SampleDone(stage, shard, ok=number >= bad))
        emit(ShardDone(stage, shard, 2, cached=False))


def test_how_far_how_fast_and_how_long(clock: Clock) -> None:
    progress = Progress({"low_res": 4, "high_res": 4}, [0, 1], clock)
    assert progress.percent == 0
    assert headline(progress) == "0 of 4 images; time left: estimating; starting"
    work(progress, clock, "low_res", 0, 2, 1.0)
    assert progress.percent == 25
    hear(progress, ShardStarted("high_res", 0, 2), Step(3, 20))
    assert headline(progress).endswith("; shard 000000: upscaling, step 3 of 20")
    work(progress, clock, "high_res", 0, 2, 10.0, bad=1)
    assert progress.percent == 50
    assert progress.seconds_left == pytest.approx(2 * 1.0 + 2 * 10.0)
    assert headline(progress).startswith(
        "1 of 4 images; 0.0455 images per second; time left: 22 s; 1 samples failed; shard 000000: upscaling"
    )
    assert table(progress) == [
        {"shard": "000000", "state": "finished", "seconds": 22.0, "failed samples": 1},
        {"shard": "000001", "state": "waiting", "seconds": 0.0, "failed samples": 0},
    ]
    hear(progress, ShardStarted("low_res", 1, 2), ShardFailed(1, "low_res: 2 of 2 samples failed"))
    assert table(progress)[0]["state"] == "failed: low_res: 2 of 2 samples failed", "what needs attention comes first"
    assert progress.percent == 50, "a run that could not finish never reads 100"


def test_a_run_that_has_ended_tells_of_no_work_any_more(clock: Clock) -> None:
    progress = Progress({"low_res": 4, "high_res": 4}, [0, 1, 2], clock)
    work(progress, clock, "low_res", 0, 2, 1.0)
    hear(progress, ShardFailed(0, "captions: no server"), ShardStarted("low_res", 1, 2), Step(3, 20))
    progress.end()
    assert headline(progress) == "0 of 4 images; ended after 2 s"
    states = {row["shard"]: row["state"] for row in table(progress)}
    assert states == {"000000": "failed: captions: no server", "000001": "low_res not finished", "000002": "not begun"}


def test_runs_elsewhere_are_no_part_of_the_last_line(clock: Clock) -> None:
    progress = Progress({"high_res": 8}, [0, 1], clock)
    hear(progress, RunSubmitted("a", "demo: shards 0-1"), Dispatched(1, 2, 1, 0))
    clock.now = 40.0
    progress.end()
    assert headline(progress) == "1 of 2 shards; about 0.1 images per second; ended after 40 s"


def test_a_run_that_found_nothing_to_do_says_so() -> None:
    assert headline(Progress()) == "everything was committed already"
    assert (Progress().percent, table(Progress())) == (100.0, [])


def test_a_build_may_tell_its_work_later(clock: Clock) -> None:
    told, later = Progress({"low_res": 4, "high_res": 4}, [0, 1], clock), Progress(clock=clock)
    assert headline(later) != headline(told)
    hear(later, WorkFound({"low_res": 4, "high_res": 4}, [0, 1]))
    for progress in (told, later):
        work(progress, clock, "low_res", 0, 2, 1.0)
    assert (headline(later), table(later), later.percent) == (headline(told), table(told), 25)


def test_a_line_per_committed_stage_and_per_failed_shard(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress({"low_res": 2, "high_res": 2}, [0], clock)
    with listening(progress.hear), listening(lines(progress, said.append)):
        for stage, seconds in (("low_res", 2.0), ("high_res", 20.0)):
            emit(ShardStarted(stage, 0, 2))
            clock.now += seconds
            emit(ShardDone(stage, 0, 2, cached=False))
            emit(ShardDone(stage, 0, 2, cached=True))
        emit(ShardFailed(1, "low_res: 2 of 2 samples failed"))
    assert said == [
        "shard 000000: low_res committed in 2 s",
        "shard 000000: high_res committed in 20 s",
        "shard 000001 failed: low_res: 2 of 2 samples failed",
    ]


def test_shards_that_others_finished_count_as_done(clock: Clock) -> None:
    progress = Progress({"low_res": 2, "high_res": 2}, [0], clock)
    hear(progress, *(ShardDone(stage, 0, 2, cached=True) for stage in ("low_res", "high_res")))
    assert progress.percent == 100
    assert "took" in headline(progress)


def test_what_was_reckoned_with_and_is_there_already_is_no_work(clock: Clock) -> None:
    progress = Progress({"low_res": 4, "high_res": 4}, [0, 1], clock, reckoned=True)
    hear(progress, *(ShardDone(stage, 0, 2, cached=True) for stage in ("low_res", "high_res")))
    assert (progress.percent, progress.samples_total) == (0, 4)
    work(progress, clock, "low_res", 1, 2, 1.0)
    assert progress.percent == 50
    work(progress, clock, "high_res", 1, 2, 1.0)
    assert progress.percent == 100


def test_a_repeated_attempt_never_passes_100(clock: Clock) -> None:
    progress = Progress({"high_res": 2}, [0, 1], clock)
    for _ in range(3):
        work(progress, clock, "high_res", 0, 2, 1.0)
    assert progress.percent == 100


def test_work_that_is_done_by_other_runs(clock: Clock) -> None:
    progress = Progress({"high_res": 80}, range(20), clock)
    for run, name, shards in (("a", "demo: shards 0-9", range(10)), ("b", "demo: shards 10-19", range(10, 20))):
        hear(progress, RunSubmitted(run, name, shards, f"http://server/{run}"))
    hear(progress, Dispatched(0, 20, 2, 0))
    assert progress.seconds_left is None
    clock.now = 40.0
    hear(progress, Dispatched(5, 20, 2, 0))
    assert progress.percent == 25
    assert headline(progress) == (
        "5 of 20 shards; about 0.5 images per second; time left: 2 min 00 s; 2 runs at work, 0 waiting"
    )
    hear(progress, RunEnded("b", "Crashed: no commit within 3600 s", finished=False))
    progress.failed_elsewhere = {3: 1, 4: 2}
    assert table(progress) == [
        {
            "run": "demo: shards 10-19",
            "state": "Crashed: no commit within 3600 s",
            "failed samples": "0",
            "link": "http://server/b",
        },
        {
            "run": "demo: shards 0-9",
            "state": "submitted",
            "failed samples": "3 (shard 3: 1, shard 4: 2)",
            "link": "http://server/a",
        },
    ]
    assert "; 3 samples failed; " in headline(progress)


def test_a_row_counts_few_shards_one_by_one(clock: Clock) -> None:
    progress = Progress({"high_res": 80}, range(20), clock)
    hear(progress, RunSubmitted("a", "demo: shards 0-19", range(20)))
    progress.failed_elsewhere = dict.fromkeys(range(20), 1)
    (row,) = table(progress)
    assert row["failed samples"].startswith("20 (shard 0: 1, shard 1: 1, ")
    assert row["failed samples"].endswith("shard 9: 1, ...)")


def test_shards_on_a_cluster_show_that_they_are_finished(clock: Clock) -> None:
    progress = Progress({"high_res": 4}, [0, 1], clock)
    hear(progress, ShardFinished(0), ShardFailed(1, "lost"), Dispatched(1, 2, 0, 0))
    progress.end()
    assert {row["shard"]: row["state"] for row in table(progress)} == {"000000": "finished", "000001": "failed: lost"}


def test_a_table_of_a_large_dataset_is_cut_and_says_so(clock: Clock) -> None:
    progress = Progress({"high_res": 5000}, range(5000), clock)
    hear(progress, ShardFailed(4321, "lost"))
    rows = table(progress)
    assert len(rows) == ROWS + 1
    assert rows[0]["shard"] == "004321"
    assert rows[-1] == {"shard": f"and {5000 - ROWS} more"}


def test_nothing_to_do(clock: Clock) -> None:
    progress = Progress({}, [], clock)
    assert progress.percent == 100
    assert table(progress) == []


def test_who_listens_within_hears_beside_who_listens_without() -> None:
    heard: list[tuple[str, Event]] = []
    one, two, three = Step(1, 3), Step(2, 3), Step(3, 3)
    with listening(lambda event: heard.append(("outer", event))):
        emit(one)
        with listening(lambda event: heard.append(("inner", event))):
            emit(two)
        emit(three)
    emit(one)
    assert heard == [("outer", one), ("outer", two), ("inner", two), ("outer", three)]
