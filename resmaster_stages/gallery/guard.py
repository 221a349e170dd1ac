"""Stands before the server: answers nobody who does not hold the token, and no page of another site.

Invariants:
- The first part of a path is the token. It is compared in constant time, and any other path gets an empty 404.
- The header Host names this server by a loopback name. (A foreign name that leads here is an attack.)
- Requests that write are JSON, come from our own page if from a page at all, and are not large.
- No answer may be used by another site, be taken for another type of file, or tell others the address with the token.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

BODY_BYTES = 4 << 20
"""Longest body of a request."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Passes requests with the token on to `app`, without the token in their path. An ASGI application."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token.encode()
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # no websockets

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        known = hmac.compare_digest(first.encode("utf-8", "surrogatepass"), self._token)
        hosts = headers.getlist("host")
        if not known or len(hosts) != 1 or hosts[0] not in self._hosts:
            await _answer(send_with_headers, 404)
        elif not slash:
            await _answer(send_with_headers, 308, location=f"/{self._token.decode()}/")
        elif scope["method"] not in ("GET", "HEAD") and (refusal := _refusal(headers, hosts[0])):
            await _answer(send_with_headers, *refusal)
        else:
            inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode("utf-8", "surrogatepass")}
            await self._app(inner, receive, send_with_headers)


def _refusal(headers: Headers, host: str) -> tuple[int, str] | None:
    """Status and reason of the refusal of a request that writes; None if it may."""
    if any(origin != f"http://{host}" for origin in headers.getlist("origin")):
        return 403, "only the page of this server may write here"
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "send JSON, as Content-Type: application/json"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > BODY_BYTES:
        return 413, f"the request is longer than {BODY_BYTES} bytes; send less at a time"
    return None


async def _answer(send: Send, status: int, error: str = "", location: str = "") -> None:
    """Answer with an error as JSON, or with nothing."""
    headers = [(b"content-type", b"application/json")] if error else []
    headers += [(b"location", location.encode())] if location else []
    body = json.dumps({"error": error}).encode() if error else b""
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
