"""The terminal's view of a build: one bar with time left, what is being done now, and a line per finished shard.

Knows nothing about Prefect. On anything but a terminal it prints plain lines and no bar.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from resmaster_flows.watch.pace import VERBS, TimeLeft, spell_seconds
from resmaster_stages.progress import Silent


class Notes(Silent):
    """A `Reporter` that prints what is noted, each line once, and nothing else."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._noted: set[str] = set()

    def note(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


class TerminalReporter(Notes):
    """A `Reporter` that draws a live display; use as a context manager around the build.

    `pending` is the number of samples still to do per stage, `shards` the number of shards in the dataset.
    """

    def __init__(self, pending: dict[str, int], shards: int, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=True))
        self._left = TimeLeft(pending)
        self._shards = shards
        self._clock = time.monotonic()
        self._failed = 0
        self._last_stage, self._images_total = list(pending.items())[-1] if pending else ("quality", 0)
        self._images = 0
        self._shard_clock: dict[tuple[str, int], float] = {}
        self._dispatched = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[images]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._bar: TaskID = self._progress.add_task(
            "starting", total=sum(pending.values()) or None, left="", images=self._images_text()
        )

    def __enter__(self) -> TerminalReporter:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.__exit__(kind, value, tb)

    def _describe(self, stage: str, shard: int, detail: str = "") -> str:
        return f"shard {shard + 1}/{self._shards}  {VERBS.get(stage, stage)}{detail}"

    def _left_text(self) -> str:
        return f"time left: {spell_seconds(self._left.seconds())}"

    def _images_text(self) -> str:
        return f"images: {self._images}/{self._images_total}"

    def shard_started(self, stage: str, shard: int, samples: int) -> None:
        self._clock = time.monotonic()
        self._shard_clock[stage, shard] = self._clock
        self._now = (stage, shard)
        self._progress.update(self._bar, description=self._describe(stage, shard), left=self._left_text())

    def sample_done(self, stage: str, shard: int, ok: bool) -> None:
        now = time.monotonic()
        self._left.sample_done(stage, now - self._clock)
        self._clock = now
        self._failed += not ok
        self._images += ok and stage == self._last_stage
        failed = f"  [red]{self._failed} failed" if self._failed else ""
        self._progress.update(
            self._bar,
            advance=1,
            description=self._describe(stage, shard),
            images=self._images_text(),
            left=self._left_text() + failed,
        )

    def shard_done(self, stage: str, shard: int, cached: bool) -> None:
        if cached:
            return
        seconds = time.monotonic() - self._shard_clock.pop((stage, shard), time.monotonic())
        self.console.print(f"  shard {shard:06d}  {stage:<9} committed in {spell_seconds(seconds)}", highlight=False)

    def dispatched(self, done: int, total: int, running: int, waiting: int) -> None:
        line = f"{done} of {total} shards finished; {running} runs at work, {waiting} waiting"
        self._progress.update(self._bar, description=line, completed=done, total=total)
        if line != self._dispatched:
            self._dispatched = line
            self.console.print(f"  {line}", highlight=False)

    def step(self, done: int, total: int) -> None:
        stage, shard = self._now
        self._progress.update(self._bar, description=self._describe(stage, shard, f"  step {done}/{total}"))
