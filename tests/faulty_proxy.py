"""An HTTP proxy in front of an S3 store that fails at chosen requests, in the ways that stores and networks fail.

    rules = [Rule("slow down", share=0.1), Rule("bit flip", key="commits/", strikes=1)]
    with faulty(server.endpoint, seeded(rules, seed=3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

A choice is a function of (method, path with query, how often this request was made before) to the name of a fault, or
None. `seeded` makes one of rules: the same seed strikes the same requests, in whatever order they come. A `Rule` names
the fault (of `ALL_FAULTS`), the share of requests, the methods, a pattern for the path, and how often one request may
be struck. `proxy.choose` may be replaced at any time, and `proxy.faults` counts what was done, by fault and method.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("slow down", "reset", "time-out", "torn", "lost answer")
"""503 SlowDown; a connection reset before the request is passed on; no answer at all; half the answer's body; a
connection reset after the store has done what was asked. A client that asks again overcomes each of them."""

ANSWERS: dict[str, tuple[int, str]] = {
    "slow down": (503, "SlowDown"),
    "unavailable": (503, "ServiceUnavailable"),
    "internal error": (500, "InternalError"),
    "too many requests": (429, "TooManyRequests"),
    "bad gateway": (502, ""),
    "request time-out": (400, "RequestTimeout"),
    "access denied": (403, "AccessDenied"),
    "unknown key": (403, "InvalidAccessKeyId"),
    "wrong secret": (403, "SignatureDoesNotMatch"),
    "expired token": (400, "ExpiredToken"),
    "invalid token": (400, "InvalidToken"),
    "clock skew": (403, "RequestTimeTooSkewed"),
    "wrong region": (301, "PermanentRedirect"),
    "no such bucket": (404, "NoSuchBucket"),
    "not implemented": (501, "NotImplemented"),
    "not allowed": (405, "MethodNotAllowed"),
    "store full": (507, "XMinioStorageFull"),
    "quota": (403, "QuotaExceeded"),
    "archived": (403, "InvalidObjectState"),
    "bad digest": (400, "BadDigest"),
    "unknown refusal": (418, "SomethingElse"),
}
"""Fault -> status and S3 code that are answered, while the request is not passed on. No code: a page of a gateway."""

SPOILT = ("torn", "short", "bit flip", "not xml", "no http")
"""What is done to an answer: half its body and a reset; half its body under a length that fits; one bit of its body
flipped; a page of HTML with status 200 instead of it; bytes that are no HTTP. Answers without a body pass unchanged,
but for the last two."""

ALL_FAULTS = tuple(dict.fromkeys((*FAULTS, *SPOILT, *ANSWERS)))

PAGE = b"<!doctype html><html><body><h1>Please log in</h1></body></html>"

Choose = Callable[[str, str, int], str | None]
"""(method, path, how often this request was made before) -> the fault, or None for none."""


@dataclass(frozen=True)
class Rule:
    """A fault, and the requests that it strikes."""

    fault: str
    share: float = 1.0
    methods: str = "GET HEAD PUT POST DELETE"
    key: str = ""
    """A regular expression that is searched in the path with its query."""
    strikes: int | None = None
    """How often one request may be struck; None: always."""


def seeded(rules: Sequence[Rule], seed: int = 0) -> Choose:
    """A choice by `rules`, the first that strikes. It depends on the request and the seed alone."""
    for rule in rules:
        if rule.fault not in ALL_FAULTS:
            raise ValueError(f"no such fault: {rule.fault}")

    def choose(method: str, path: str, before: int) -> str | None:
        for number, rule in enumerate(rules):
            if method not in rule.methods.split() or not re.search(rule.key, path):
                continue
            if rule.strikes is not None and before >= rule.strikes:
                continue
            digest = hashlib.sha256(f"{seed} {number} {method} {path} {before}".encode()).digest()
            if int.from_bytes(digest[:8]) < rule.share * 2**64:
                return rule.fault
        return None

    return choose


class Proxy:
    """A proxy at `endpoint`; `faults` counts what it did, by fault and method."""

    def __init__(self, endpoint: str, choose: Choose) -> None:
        self.choose = choose
        self.faults: Counter[tuple[str, str]] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        target, proxy = urlsplit(endpoint).netloc, self

        class Handler(_Handler):
            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault(self.command, self.path)
                if fault == "reset":
                    return self.reset()
                if fault == "time-out":
                    proxy.closing.wait(60)
                    return self.reset()
                if fault in ANSWERS:
                    return self.refuse(*ANSWERS[fault])
                connection = http.client.HTTPConnection(target, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                try:
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    data = response.read()
                finally:
                    connection.close()
                if fault == "lost answer":
                    return self.reset()
                return self.pass_on(response, data, fault)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        self._server = _Server(("127.0.0.1", 0), Handler)
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None: ...  # clients hang up on purpose here


class _Handler(BaseHTTPRequestHandler):
    """The answers of a proxy."""

    protocol_version = "HTTP/1.1"

    def refuse(self, status: int, code: str) -> None:
        """Answer with an error as S3 does, or with a gateway's page if there is no code."""
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told by the proxy</Message></Error>"
        self.answer(status, {"Content-Type": "application/xml"}, text.encode() if code else PAGE)

    def pass_on(self, response: http.client.HTTPResponse, data: bytes, fault: str | None) -> None:
        """Pass the store's answer on, spoilt by `fault`."""
        dropped = ("content-length", "transfer-encoding", "connection")
        headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
        if fault == "no http":
            self.wfile.write(b"\x15\x03\x01\x00\x02\x02\x50" * 9)
            return self.reset(politely=True)
        if fault == "not xml":
            return self.answer(200, {"Content-Type": "text/html"}, PAGE)
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "bit flip" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        if self.command == "HEAD":
            return self.answer(response.status, headers, b"", response.getheader("Content-Length") or "0")
        if fault == "torn" and len(data) > 1:
            self.answer(response.status, headers, data[: len(data) // 2], str(len(data)))
            self.wfile.flush()
            return self.reset()
        return self.answer(response.status, headers, data)

    def answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        """Answer. length: what the header says, if it is not the length of the body."""
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reset(self, politely: bool = False) -> None:
        """Close the connection; unless politely, so that the client's read fails."""
        self.close_connection = True
        if not politely:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *arguments: Any) -> None: ...


@contextmanager
def faulty(endpoint: str, choose: Choose) -> Iterator[Proxy]:
    """A proxy in front of `endpoint` until the block ends."""
    proxy = Proxy(endpoint, choose)
    try:
        yield proxy
    finally:
        proxy.close()
