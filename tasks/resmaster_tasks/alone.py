"""A lock that lets a process do one shard at a time.

It has a module of its own because tasks are pickled by value: a lock in a task's module would be copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_device = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """Only one thread of this process can be inside such a block."""
    with _device:
        yield
