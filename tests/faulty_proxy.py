"""An HTTP proxy in front of a store that fails at chosen requests, in the ways that stores and networks fail."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("slow down", "reset", "time-out", "torn", "lost answer")
"""503 SlowDown; a connection reset before the request is passed on; no answer at all; half the answer's body; a
connection reset after the store has done what was asked."""

Choose = Callable[[str, str, int], str | None]
"""(method, path, how often this request was made before) -> the fault, or None for none."""


class Proxy:
    """A proxy at `endpoint`; `faults` counts what it did, by fault and method."""

    def __init__(self, endpoint: str, choose: Choose) -> None:
        self.choose = choose
        self.faults: Counter[tuple[str, str]] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        target, proxy = urlsplit(endpoint).netloc, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault(self.command, self.path)
                if fault == "slow down":
                    return self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, str(len(SLOW_DOWN)))
                if fault == "reset":
                    return self._reset()
                if fault == "time-out":
                    proxy.closing.wait(60)
                    return self._reset()
                connection = http.client.HTTPConnection(target, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                try:
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    data = response.read()
                finally:
                    connection.close()
                if fault == "lost answer":
                    return self._reset()
                kept = {
                    n: v
                    for n, v in response.getheaders()
                    if n.lower() not in ("content-length", "transfer-encoding", "connection")
                }
                length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self._answer(response.status, kept, data, length or "0", torn=fault == "torn" and len(data) > 1)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

            def _answer(
                self, status: int, headers: dict[str, str], data: bytes, length: str, torn: bool = False
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(data[: len(data) // 2] if torn else data)
                if torn:
                    self.wfile.flush()
                    self._reset()

            def _reset(self) -> None:
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            def log_message(self, *arguments: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None: ...  # clients hang up on purpose here

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def fault(self, method: str, path: str) -> str | None:
        """What happens to this request."""
        with self._lock:
            before = self.seen[method, path]
            self.seen[method, path] += 1
            fault = self.choose(method, path, before)
            if fault:
                self.faults[fault, method] += 1
            return fault

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def faulty(endpoint: str, choose: Choose) -> Iterator[Proxy]:
    """A proxy in front of `endpoint` until the block ends."""
    proxy = Proxy(endpoint, choose)
    try:
        yield proxy
    finally:
        proxy.close()
