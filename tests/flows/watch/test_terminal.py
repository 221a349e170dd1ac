"""The terminal's view of a build: what it estimates and what it prints."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from resmaster_flows.watch.decisions import LINES_OF_A_KIND
from resmaster_flows.watch.events import Decision, Dispatched
from resmaster_flows.watch.pace import TimeLeft, spell_seconds
from resmaster_flows.watch.progress import Progress
from resmaster_flows.watch.terminal import terminal
from resmaster_stages.progress import Event, Note, SampleDone, ShardDone, ShardStarted, Step, emit


def test_time_left_is_unknown_until_every_pending_stage_was_seen() -> None:
    left = TimeLeft({"low_res": 2, "high_res": 3})
    left.sample_done("low_res", 1.0)
    assert left.seconds() is None
    left.sample_done("high_res", 10.0)
    assert left.seconds() == pytest.approx(1 * 1.0 + 2 * 10.0)


def test_time_left_ends_at_zero() -> None:
    left = TimeLeft({"low_res": 1})
    left.sample_done("low_res", 5.0)
    assert left.seconds() == 0
    left.sample_done("low_res", 5.0)  # a sample more than planned does not count backwards
    assert left.seconds() == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "estimating"), (4.4, "4 s"), (93.2, "1 min 33 s"), (59.9, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_spelling(seconds: float | None, text: str) -> None:
    assert spell_seconds(seconds) == text


def drive(*events: Event, on_a_terminal: bool = False, shards: Sequence[int] = range(4)) -> str:
    """What is printed; the last event comes after the bar was drawn."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=on_a_terminal, width=100, no_color=True)
    with terminal(Progress({"high_res": 2}, shards), console) as bar:
        for event in events[:-1]:
            emit(event)
        bar.refresh()
        emit(events[-1])
    return out.getvalue()


SHARD = (
    ShardDone("low_res", 1, 2, cached=True),
    ShardStarted("high_res", 1, 2),
    Step(3, 20),
    SampleDone("high_res", 1, ok=True),
    SampleDone("high_res", 1, ok=False),
    ShardDone("high_res", 1, 2, cached=False),
)


def test_without_a_terminal_only_finished_shards_are_printed() -> None:
    assert drive(*SHARD).splitlines() == ["  shard 000001  high_res  committed in 0 s"]


def test_a_terminal_shows_stage_shard_count_time_and_failures() -> None:
    text = drive(*SHARD, on_a_terminal=True)
    for part in ("shard 2/4", "upscaling", "images: 1/2", "time left", "1 failed", "committed"):
        assert part in text
    assert "upscaling  step 3/20" in drive(*SHARD[:3], SHARD[3], on_a_terminal=True)


def test_shards_are_counted_among_those_of_the_build() -> None:
    assert "shard 1/2" in drive(*SHARD, on_a_terminal=True, shards=[1, 12])


def test_what_is_noted_is_printed_once_and_as_it_stands() -> None:
    text = drive(Note("a [bold] line :warning:"), Note("another"), Note("a [bold] line :warning:"))
    assert text.splitlines() == ["  a [bold] line :warning:", "  another"]


def test_the_work_of_other_runs_is_told_by_tenths_and_when_it_begins_or_rests() -> None:
    text = drive(Dispatched(0, 40, 0, 2), Dispatched(0, 40, 2, 0), *(Dispatched(n, 40, 2, 0) for n in range(10)))
    assert text.splitlines() == [
        "  0 of 40 shards finished; 0 runs at work, 2 waiting",
        "  0 of 40 shards finished; 2 runs at work, 0 waiting",
        "  4 of 40 shards finished; 2 runs at work, 0 waiting",
        "  8 of 40 shards finished; 2 runs at work, 0 waiting",
    ]


def test_decisions_are_printed_and_of_one_kind_not_too_many() -> None:
    text = drive(*(Decision(f"submitted [{n}]", "submitted runs") for n in range(100)), Decision("the end"))
    printed = text.splitlines()
    assert printed[0] == "  submitted [0]"
    assert len(printed) == LINES_OF_A_KIND + 2
    assert printed[-2:] == [
        "  more lines about submitted runs are left out; the table of the build's page has every run",
        "  the end",
    ]
