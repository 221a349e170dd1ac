"""The number of threads with which torch computes on the host. On a CPU, another number rounds differently."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def torch_threads() -> int | None:
    """The number of threads of the calling thread's computations; None if torch is not loaded."""
    torch = sys.modules.get("torch")
    count: int | None = None if torch is None else torch.get_num_threads()
    return count


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Within the block, torch computes with `count` threads in the calling thread. None changes nothing."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
