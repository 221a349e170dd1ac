"""Where a stage says how far it is: in events. Knows nothing about terminals or servers: listeners are plugged in from
above.

The listeners are a context variable, so that neither stages nor tasks carry them through their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


class Event:
    """Something that happened. Rooms above define more events."""


@dataclass(frozen=True)
class ShardStarted(Event):
    """A stage begins to compute a shard of `samples` samples."""

    stage: str
    shard: int
    samples: int


@dataclass(frozen=True)
class SampleDone(Event):
    """One sample of the shard is finished, or failed (`ok` is False)."""

    stage: str
    shard: int
    ok: bool


@dataclass(frozen=True)
class ShardDone(Event):
    """The shard of `samples` samples is committed; `cached` if it was so before this run."""

    stage: str
    shard: int
    samples: int
    cached: bool


@dataclass(frozen=True)
class ShardFailed(Event):
    """The shard could not be finished, for a reason that is told in one line."""

    shard: int
    error: str


@dataclass(frozen=True)
class Step(Event):
    """Denoising step `done` of `total` of the sample at hand."""

    done: int
    total: int


@dataclass(frozen=True)
class Planned(Event):
    """The input was read and planned, with what came out in a line."""

    line: str


@dataclass(frozen=True)
class Note(Event):
    """A fact that the user should know, in a line; it may be told for every sample, and is shown once."""

    line: str


Listener = Callable[[Event], None]
"""Hears what happens. Called often (per sample, per denoising step): it must be cheap, and ignore events that it does
not know."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def emit(event: Event) -> None:
    """Tell the listeners of the current context, in the order in which they began to listen."""
    for listener in _listeners.get():
        listener(event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block `listener` hears every event, beside those that listen already."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
