"""Stops the command line within seconds. Ctrl-C and SIGTERM unwind the work, which keeps what is done and tidies up
after itself; a second one, or a few seconds of something that does not unwind (a server that no longer answers), ends
the process at once.

Signals are watched by a thread through the wake-up descriptor: whatever handler a library puts in their place, and even
while the main thread is inside native code, they are seen here.
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

GRACE_SECONDS = 3.0
MESSAGE = "interrupted; what is done is kept: run the same command again to go on"
STOPS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM arrived. As KeyboardInterrupt, it is no error that anybody should handle."""


def exit_status(stop: int) -> int:
    """Of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + stop


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt; who ignores them is ended.

    Does nothing outside of the main thread, which is where signals arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, _terminate)
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="stop", daemon=True)
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


def _watch(reader: socket.socket) -> None:
    """Ends the process at the second signal, or `GRACE_SECONDS` after the first. Returns when the other end is
    closed."""
    stops: list[int] = []
    with suppress(TimeoutError):
        while len(stops) < 2:
            number = reader.recv(1)
            if not number:
                return
            if number[0] in STOPS:
                stops.append(number[0])
                reader.settimeout(GRACE_SECONDS)
    _leave(stops[0])


def _leave(number: int) -> NoReturn:
    """End the process here and now, and the server that Prefect may have started for it."""
    server = sys.modules.get("prefect.server.api.server")
    for instance in list(getattr(getattr(server, "SubprocessASGIServer", None), "_instances", {}).values()):
        process = getattr(instance, "server_process", None)
        if process is not None:
            process.kill()
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{show_cursor}{MESSAGE}\n".encode())
    os._exit(exit_status(number))
