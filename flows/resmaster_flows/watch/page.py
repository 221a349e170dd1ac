"""What the page of a run shows while it works: how far it is, how fast, what is left, and a row per shard or run.

Listens as a `Reporter` and renders when asked. Knows nothing about Prefect; `resmaster_flows.watch.artifacts` brings the page there. Rendering
may happen in another thread than listening.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resmaster_flows.watch.pace import VERBS, TimeLeft, spell_seconds
from resmaster_stages.progress import Silent

ROWS = 200
"""A table shows so many rows at most: what failed, what is at work, what is finished, what waits."""


@dataclass
class Row:
    """A line of the table: a shard that is worked on here, or a run that works on shards elsewhere."""

    name: str
    state: str = "waiting"
    rank: int = 3
    """0 failed, 1 at work, 2 finished, 3 waiting: the order of the table."""
    seconds: float = 0.0
    samples_failed: int = 0
    where: str = ""
    """Address of the run; "" for work that is done here."""


class RunPage(Silent):
    """The page of one run over `shards`.

    `pending`: stage -> samples to do; `log` hears a line per committed stage, and what is noted; `link` makes an address of a run's id.
    """

    def __init__(
        self,
        pending: Mapping[str, int],
        shards: Sequence[int],
        log: Callable[[str], None] = lambda line: None,
        link: Callable[[str], str] = lambda run: run,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._link = log, link
        self._clock = clock
        self._begin = clock()
        self._left = TimeLeft(dict(pending))
        self._last_stage, self._images_total = list(pending.items())[-1] if pending else ("quality", 0)
        self._total = sum(pending.values())
        self._done = self._images = self._failed = 0
        self._shards = {shard: Row(f"{shard:06d}") for shard in shards}
        self._runs: dict[str, Row] = {}
        self._share: tuple[int, int] | None = None
        self._now = "starting"
        self._noted: set[str] = set()
        self._sample_clock = self._shard_clock = self._begin

    # ------------------------------------------------------------------------------------------------------- listening

    def shard_started(self, stage: str, shard: int, samples: int) -> None:
        self._sample_clock = self._shard_clock = self._clock()
        row = self._row(shard)
        row.state, row.rank = stage, 1
        self._now = f"shard {shard:06d}: {VERBS.get(stage, stage)}"

    def sample_done(self, stage: str, shard: int, ok: bool) -> None:
        now = self._clock()
        self._left.sample_done(stage, now - self._sample_clock)
        self._sample_clock = now
        self._done += 1
        self._images += ok and stage == self._last_stage
        self._failed += not ok
        self._row(shard).samples_failed += not ok

    def shard_done(self, stage: str, shard: int, cached: bool) -> None:
        row = self._row(shard)
        if not cached:
            seconds = self._clock() - self._shard_clock
            row.seconds += seconds
            self._log(f"shard {shard:06d}: {stage} committed in {spell_seconds(seconds)}")
        if stage == self._last_stage:
            row.state, row.rank = "finished", 2

    def shard_failed(self, shard: int, error: str) -> None:
        row = self._row(shard)
        row.state, row.rank = f"failed: {error}", 0
        self._log(f"shard {shard:06d} failed: {error}")

    def step(self, done: int, total: int) -> None:
        self._now = f"{self._now.partition(', step')[0]}, step {done} of {total}"

    def note(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self._log(line)

    def run_submitted(self, run: str, name: str) -> None:
        self._runs[run] = Row(name, state="submitted", rank=1, where=self._link(run))

    def run_ended(self, run: str, state: str, finished: bool) -> None:
        row = self._runs[run]
        row.state, row.rank = state, 2 if finished else 0

    def dispatched(self, done: int, total: int, running: int, waiting: int) -> None:
        self._share = (done, total)
        self._now = f"{running} runs at work, {waiting} waiting"

    def _row(self, shard: int) -> Row:
        return self._shards.setdefault(shard, Row(f"{shard:06d}"))

    # ------------------------------------------------------------------------------------------------------- rendering

    @property
    def percent(self) -> float:
        """Of the work that there was at the start."""
        if self._share:
            return 100.0 * self._share[0] / max(1, self._share[1])
        rows = list(self._shards.values())
        if all(row.rank == 2 for row in rows):
            return 100.0
        return round(min(100.0, 100.0 * self._done / max(1, self._total)), 1)

    @property
    def seconds_left(self) -> float | None:
        """None while unknown."""
        if not self._share:
            return self._left.seconds()
        done, total = self._share
        return (self._clock() - self._begin) * (total - done) / done if done else None

    def headline(self) -> str:
        """How far the run is, in one line."""
        spent = max(1e-9, self._clock() - self._begin)
        if self._share:
            done, total = self._share
            images = self._images_total * done / max(1, total)
            parts = [f"{done} of {total} shards"]
            parts += [f"about {images / spent:.3g} images per second"] if done else []
        else:
            parts = [f"{self._images} of {self._images_total} images"]
            parts += [f"{self._images / spent:.3g} images per second"] if self._images else []
        finished = self.percent == 100
        parts.append(f"took {spell_seconds(spent)}" if finished else f"time left: {spell_seconds(self.seconds_left)}")
        parts += [f"{self._failed} samples failed"] if self._failed else []
        parts += [] if finished else [self._now]
        return "; ".join(parts)

    def table(self) -> list[dict[str, Any]]:
        """The table's rows; what needs attention comes first."""
        rows = list(self._runs.values()) or list(self._shards.values())
        shown = sorted(rows, key=lambda row: row.rank)[:ROWS]  # stable: in the order of the shards
        table: list[dict[str, Any]] = [
            {"run": row.name, "state": row.state, "link": row.where}
            if row.where
            else {
                "shard": row.name,
                "state": row.state,
                "seconds": round(row.seconds, 1),
                "failed samples": row.samples_failed,
            }
            for row in shown
        ]
        if len(rows) > len(shown):
            table.append({next(iter(table[0])): f"and {len(rows) - len(shown)} more"})
        return table
