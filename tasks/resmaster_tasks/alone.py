"""One shard at a time in a process. Its own module, because tasks are pickled by value: a lock beside one would be a
copy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_device = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block no other thread of this process is in such a block."""
    with _device:
        yield
