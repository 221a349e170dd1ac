"""A proxy in front of the S3 server, in a process of its own, that fails at random."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from benchmarks.soak.processes import fork
from tests.faulty_proxy import faulty

SHARE = 0.04
"""Share of requests that fail for themselves."""
FAULTS = (
    *("slow down", "unavailable", "internal error", "too many requests", "bad gateway", "request time-out"),
    *("reset", "lost answer", "torn", "short", "bit flip", "not xml", "no http"),
)
OUTAGE_SHARE = 0.002
"""Share of requests with which an outage begins."""
OUTAGES = ("reset", "unavailable", "expired token", "clock skew", "access denied")
LONGEST_OUTAGE = 30
"""Requests for which nothing else is answered."""


@contextmanager
def proxied(endpoint: str, seed: int) -> Iterator[tuple[str, Any]]:
    """(address of a proxy in front of `endpoint`, shared counter of its faults), until the block ends."""
    faults = get_context("fork").RawValue("l", 0)
    here, there = socket.socketpair()
    with here, there:
        pid = fork(serve, endpoint, chooser(random.Random(seed)), there, faults)
        try:
            yield here.recv(100).decode(), faults
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def serve(endpoint: str, choose: Callable[[str, str, int], str | None], told: socket.socket, faults: Any) -> None:
    """Run the proxy until this process is killed."""

    def counted(method: str, path: str, before: int) -> str | None:
        fault = choose(method, path, before)
        faults.value += fault is not None
        return fault

    with faulty(endpoint, counted) as proxy:
        told.sendall(proxy.endpoint.encode())
        signal.pause()


def chooser(chance: random.Random) -> Callable[[str, str, int], str | None]:
    """What happens to each request: mostly nothing, at times one fault, and seldom the same fault many times."""
    outage: list[str] = []

    def choose(method: str, path: str, before: int) -> str | None:
        if outage:
            return outage.pop()
        if chance.random() < OUTAGE_SHARE:
            outage.extend([chance.choice(OUTAGES)] * chance.randint(1, LONGEST_OUTAGE))
        return chance.choice(FAULTS) if chance.random() < SHARE else None

    return choose
