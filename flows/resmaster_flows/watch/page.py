"""The content of a run's page: a headline with progress, speed and time left, and a table with a row per shard or run.

This module does not use Prefect; `resmaster_flows.watch.artifacts` sends the content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from resmaster_flows.watch.pace import spell_seconds
from resmaster_flows.watch.progress import Progress, Run, Shard
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.progress import Event, Listener, ShardDone, ShardFailed
from resmaster_stages.redaction import printable

ROWS = 200
"""Maximum rows of a table, in the order: failed, at work, finished, waiting."""
SHARDS_OF_A_ROW = 10
"""Maximum shards of a run whose failed samples a row of the table counts one by one."""

Key = TypeVar("Key")
Row = TypeVar("Row", Shard, Run)


def headline(progress: Progress) -> str:
    """The progress of the run in one line."""
    if not progress.shards and not progress.dispatched:
        return "everything was committed already"
    spent = max(1e-9, progress.seconds)
    if progress.dispatched:
        done, total = progress.dispatched.done, progress.dispatched.total
        images = progress.images_total * done / max(1, total)
        parts = [f"{done} of {total} shards"]
        parts += [f"about {images / spent:.3g} images per second"] if done else []
    else:
        parts = [f"{progress.images} of {progress.images_total} images"]
        parts += [f"{progress.images / spent:.3g} images per second"] if progress.images else []
    finished = progress.percent == 100
    if finished or progress.ended:
        parts.append(f"{'took' if finished else 'ended after'} {spell_seconds(spent)}")
    else:
        parts.append(f"time left: {spell_seconds(progress.seconds_left)}")
    failed = progress.samples_failed + sum(progress.failed_elsewhere.values())
    parts += [f"{failed} samples failed"] if failed else []
    parts += [] if finished or progress.ended else [_now(progress)]
    return "; ".join(parts)


def _now(progress: Progress) -> str:
    """What is being done now."""
    if progress.dispatched:
        return f"{progress.dispatched.running} runs at work, {progress.dispatched.waiting} waiting"
    if progress.now is None:
        return "starting"
    step = f", step {progress.step.done} of {progress.step.total}" if progress.step else ""
    return f"shard {progress.now.shard:06d}: {STAGES[progress.now.stage].doing}{step}"


def table(progress: Progress) -> list[dict[str, Any]]:
    """The rows of the table; rows that need attention come first."""
    rows: list[dict[str, Any]]
    if progress.runs:
        total = len(progress.runs)
        rows = [
            {
                "run": printable(run.name),
                "state": printable(run.state),
                "failed samples": _failed(run, progress.failed_elsewhere),
                "link": run.address,
            }
            for _, run in _first(progress.runs)
        ]
    else:
        total = len(progress.shards)
        rows = [
            {
                "shard": f"{number:06d}",
                "state": printable(shard.state),
                "seconds": round(shard.seconds, 1),
                "failed samples": shard.samples_failed or progress.failed_elsewhere.get(number, 0),
            }
            for number, shard in _first(progress.shards)
        ]
    if total > len(rows):
        rows.append({next(iter(rows[0])): f"and {total - len(rows)} more"})
    return rows


def _failed(run: Run, failed: Mapping[int, int]) -> str:
    """The failed samples of a run's shards: `0`, or `3 (shard 4: 2, shard 5: 1)`."""
    found = {shard: failed[shard] for shard in run.shards if shard in failed}
    each = ", ".join(f"shard {shard}: {count}" for shard, count in list(found.items())[:SHARDS_OF_A_ROW])
    more = ", ..." if len(found) > SHARDS_OF_A_ROW else ""
    return f"{sum(found.values())} ({each}{more})" if found else "0"


def _first(rows: Mapping[Key, Row]) -> list[tuple[Key, Row]]:
    return sorted(rows.items(), key=lambda row: row[1].rank)[:ROWS]  # a stable sort keeps the order of the shards


def lines(progress: Progress, log: Callable[[str], None]) -> Listener:
    """A listener that logs a line for each committed stage of a shard, and for each shard that failed."""

    def hear(event: Event) -> None:
        if isinstance(event, ShardDone) and not event.cached:
            seconds = progress.shards[event.shard].last_seconds
            log(f"shard {event.shard:06d}: {event.stage} committed in {spell_seconds(seconds)}")
        elif isinstance(event, ShardFailed):
            log(f"shard {event.shard:06d} failed: {printable(event.error)}")

    return hear
