"""How long device work takes: CUDA events around each call, wall-clock seconds on a CPU; warmed up; the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.methods import settle


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    least: float
    greatest: float
    calls: int

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "seconds": self.median,
            "seconds_least": self.least,
            "seconds_greatest": self.greatest,
            "calls": self.calls,
        }


def _each(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` calls, which are queued one behind the other."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def first_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a first call: compilation, choice of kernels and allocation included."""
    settle(device)
    start = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - start


def timed(
    call: Callable[[], Any], device: torch.device, seconds: float = 1.0, least: int = 2, most: int = 50
) -> Timing:
    """A warmed-up call's time: as many calls as fit in about `seconds`, from `least` to `most`; on a CPU, a rehearsal,
    `least`."""
    one = first_seconds(call, device)
    count = min(most, max(least, int(seconds / max(one, 1e-9)))) if device.type == "cuda" else least
    found = _each(call, device, count)
    return Timing(statistics.median(found), min(found), max(found), count)


@contextmanager
def convolutions(fast: bool) -> Iterator[None]:
    """Within the block cuDNN races its convolution kernels (`fast`), or takes deterministic ones by rule."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = fast, not fast
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
