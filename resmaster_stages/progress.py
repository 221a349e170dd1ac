"""Where a stage says how far it is. Knows nothing about terminals or servers: a reporter is plugged in from above.

The current reporter is a context variable, so that neither stages nor tasks carry it through their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Reporter(Protocol):
    """Hears what happens. Called often (per sample, per denoising step): implementations must be cheap."""

    def shard_started(self, stage: str, shard: int, samples: int) -> None:
        """A stage begins to compute a shard of `samples` samples."""

    def sample_done(self, stage: str, shard: int, ok: bool) -> None:
        """One sample of the shard is finished, or failed (`ok` is False)."""

    def shard_done(self, stage: str, shard: int, cached: bool) -> None:
        """The shard is committed; `cached` if it was so before this run."""

    def shard_failed(self, shard: int, error: str) -> None:
        """The shard could not be finished, for a reason that is told in one line."""

    def dispatched(self, done: int, total: int, running: int, waiting: int) -> None:
        """Where the work is done by others: `done` of `total` shards are finished, so many runs are at work or wait."""

    def run_submitted(self, run: str, name: str) -> None:
        """Others were asked to do a share of the work, in a run of this id and name."""

    def run_ended(self, run: str, state: str, finished: bool) -> None:
        """That run ended, in a state that is told in words; `finished` if its share is done."""

    def step(self, done: int, total: int) -> None:
        """Denoising step `done` of `total` of the sample at hand."""

    def note(self, line: str) -> None:
        """A fact that the user should know, in a line; it may be told for every sample, and is shown once."""


class Silent:
    """The reporter that says nothing, used where none was plugged in."""

    def shard_started(self, stage: str, shard: int, samples: int) -> None: ...

    def sample_done(self, stage: str, shard: int, ok: bool) -> None: ...

    def shard_done(self, stage: str, shard: int, cached: bool) -> None: ...

    def shard_failed(self, shard: int, error: str) -> None: ...

    def dispatched(self, done: int, total: int, running: int, waiting: int) -> None: ...

    def run_submitted(self, run: str, name: str) -> None: ...

    def run_ended(self, run: str, state: str, finished: bool) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def note(self, line: str) -> None: ...


class Both:
    """Passes everything on to two reporters."""

    def __init__(self, first: Reporter, second: Reporter) -> None:
        self._reporters = (first, second)

    def shard_started(self, stage: str, shard: int, samples: int) -> None:
        for each in self._reporters:
            each.shard_started(stage, shard, samples)

    def sample_done(self, stage: str, shard: int, ok: bool) -> None:
        for each in self._reporters:
            each.sample_done(stage, shard, ok)

    def shard_done(self, stage: str, shard: int, cached: bool) -> None:
        for each in self._reporters:
            each.shard_done(stage, shard, cached)

    def shard_failed(self, shard: int, error: str) -> None:
        for each in self._reporters:
            each.shard_failed(shard, error)

    def dispatched(self, done: int, total: int, running: int, waiting: int) -> None:
        for each in self._reporters:
            each.dispatched(done, total, running, waiting)

    def run_submitted(self, run: str, name: str) -> None:
        for each in self._reporters:
            each.run_submitted(run, name)

    def run_ended(self, run: str, state: str, finished: bool) -> None:
        for each in self._reporters:
            each.run_ended(run, state, finished)

    def step(self, done: int, total: int) -> None:
        for each in self._reporters:
            each.step(done, total)

    def note(self, line: str) -> None:
        for each in self._reporters:
            each.note(line)


_reporter: ContextVar[Reporter] = ContextVar("reporter", default=Silent())  # noqa: B039  (stateless)


def reporter() -> Reporter:
    """The reporter of the current context."""
    return _reporter.get()


@contextmanager
def reporting(to: Reporter) -> Iterator[None]:
    """Within the block, `reporter()` is `to`."""
    token = _reporter.set(to)
    try:
        yield
    finally:
        _reporter.reset(token)
