"""The terminal's view of a build: what it estimates and what it prints."""

import io

import pytest
from rich.console import Console

from resmaster_flows.watch.pace import TimeLeft, spell_seconds
from resmaster_flows.watch.terminal import TerminalReporter


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


def drive(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, no_color=True)
    with TerminalReporter({"high_res": 2}, shards=4, console=console) as reporter:
        reporter.shard_started("high_res", 1, 2)
        reporter.step(3, 20)
        reporter.sample_done("high_res", 1, ok=True)
        reporter.sample_done("high_res", 1, ok=False)
        reporter._progress.refresh()
        reporter.shard_done("high_res", 1, cached=False)
        reporter.shard_done("low_res", 1, cached=True)
    return out.getvalue()


def test_without_a_terminal_only_finished_shards_are_printed() -> None:
    text = drive(terminal=False)
    assert text.splitlines() == ["  shard 000001  high_res  committed in 0 s"]


def test_a_terminal_shows_stage_shard_count_time_and_failures() -> None:
    text = drive(terminal=True)
    for part in ("shard 2/4", "upscaling", "images: 1/2", "time left", "1 failed", "committed"):
        assert part in text
