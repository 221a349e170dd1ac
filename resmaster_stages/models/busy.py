"""Measures how long the device is busy, by the host's clock.

The time is counted in blocks in which the host hands work to the device and waits for the result. Waits of the device
within such a block count as work, so the idle share of a stage is a lower bound. This module does not import torch.
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
    """True within a `busy` block, whose seconds are not counted yet."""


_counter: ContextVar[BusyTime | None] = ContextVar("busy_time", default=None)


@contextmanager
def timing() -> Iterator[BusyTime]:
    """Yields a count of the seconds of all `busy` blocks within the block."""
    counted = BusyTime()
    token = _counter.set(counted)
    try:
        yield counted
    finally:
        _counter.reset(token)


@contextmanager
def busy() -> Iterator[None]:
    """Counts the block as work of the device. A nested block is not counted twice."""
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
