"""How long the device is at work, by the host's clock: counted where the host hands work over and awaits its result.
Needs no torch.

Waits of the device within such a block count as work, so the idle share of a stage is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class BusyTime:
    """A running count."""

    seconds: float = 0.0
    inside: bool = False
    """Within a block, whose seconds are not counted yet."""


_counter: ContextVar[BusyTime | None] = ContextVar("busy_time", default=None)


@contextmanager
def timing() -> Iterator[BusyTime]:
    """The time of all `busy` blocks within the block."""
    counted = BusyTime()
    token = _counter.set(counted)
    try:
        yield counted
    finally:
        _counter.reset(token)


@contextmanager
def busy() -> Iterator[None]:
    """Within the block the device is at work. A block within a block is part of it."""
    counted = _counter.get()
    if counted is None or counted.inside:
        yield
        return
    started, counted.inside = time.monotonic(), True
    try:
        yield
    finally:
        counted.seconds += time.monotonic() - started
        counted.inside = False
