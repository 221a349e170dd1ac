"""Stops the command line within seconds after Ctrl-C or SIGTERM.

The first signal raises an exception, so that the work keeps what is done and tidies up. A second signal, or
`GRACE_SECONDS` without an end (a server that no longer answers), ends the process at once.

A thread watches signals through the wake-up descriptor. It sees them even if a library has replaced the handler, and
even while the main thread is inside native code.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 10.0
"""A build cancels its runs and tells the server that it ends, which takes seconds on a busy machine."""
KEPT = "interrupted; what is done is kept: run the same command again to go on"
NOTHING_WRITTEN = "interrupted; nothing was written"
STOPS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM arrived. It is no Exception, so that handlers of errors do not catch it (like KeyboardInterrupt)."""


def exit_status(stop: int) -> int:
    """The exit status of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + stop


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Within the block, SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt. If the block then does not end,
    the process is ended, with `message`.

    Does nothing outside of the main thread, because signals arrive in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, _terminate)
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, message), name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        writer.close()
        watcher.join()
        reader.close()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _watch(reader: socket.socket, message: str) -> None:
    """End the process at the second signal, or `GRACE_SECONDS` after the first. Returns when `reader` is closed."""
    stops: list[int] = []
    with suppress(TimeoutError):
        while len(stops) < 2:
            number = reader.recv(1)
            if not number:
                return
            if number[0] in STOPS:
                stops.append(number[0])
                reader.settimeout(GRACE_SECONDS)
    leave(exit_status(stops[0]), f"{message}\n")


def leave(status: int, message: str = "") -> NoReturn:
    """End the process at once, whatever its threads still wait for."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}{message}".encode())
    os._exit(status)
