"""Progress events: stages emit events, and listeners receive them. The listeners are in `resmaster_flows.watch`.

The listeners are in a context variable, so that stages and tasks need not pass them as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


class Event:
    """Base of all events. Packages above this one define more events."""


@dataclass(frozen=True)
class ShardStarted(Event):
    """A stage begins to compute a shard with `samples` samples."""

    stage: str
    shard: int
    samples: int


@dataclass(frozen=True)
class Glance:
    """What there is to see of a sample: its prompt, and stage -> the file of its image, as far as there are images."""

    prompt: str = ""
    images: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleDone(Event):
    """One sample of the shard is finished, or failed (`ok` is False)."""

    stage: str
    shard: int
    ok: bool
    key: str = ""
    error: str = ""
    """Why the sample failed, in one line; "" if it did not."""
    glance: Callable[[], Glance] = field(default=Glance, compare=False, repr=False)
    """Reads the sample's images from local files. A listener calls it for few samples, because the stage waits, and
    only while it hears the event."""


@dataclass(frozen=True)
class ShardDone(Event):
    """The shard with `samples` samples is committed. `cached`: it was already committed before this run."""

    stage: str
    shard: int
    samples: int
    cached: bool


@dataclass(frozen=True)
class ShardFailed(Event):
    """The shard could not be finished. `error` is the reason in one line."""

    shard: int
    error: str


@dataclass(frozen=True)
class Step(Event):
    """Denoising step `done` of `total` of the current sample is finished."""

    done: int
    total: int


@dataclass(frozen=True)
class Planned(Event):
    """The input was read and planned. `line` is the result in one line."""

    line: str


@dataclass(frozen=True)
class Note(Event):
    """A fact that the user should know, in one line. It may be emitted for every sample, and is shown once."""

    line: str


Listener = Callable[[Event], None]
"""Receives events. It is called often (per sample and denoising step), so it must be cheap. It must ignore events that
it does not know."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def emit(event: Event) -> None:
    """Send an event to the listeners of the current context, in the order in which they began to listen."""
    for listener in _listeners.get():
        listener(event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` receives every event, in addition to the listeners already there."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
