"""Listens on this machine's loopback address, and gives the address of the page with its token.

Invariants:
- Only requests to a loopback name are answered, and only below the token.
- The browser loads nothing from elsewhere, and sends nothing elsewhere.
- Images are decoded by the formats that the command line reads, whatever a file is called.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resmaster_flows.app.page import THEME, page
from resmaster_flows.app.work import Work
from resmaster_stages.gallery.listener import HOST, listening
from resmaster_stages.storage.images import FORMATS
from resmaster_stages.storage.sources import MAX_FILE_BYTES

HEADERS = {
    # Gradio's page has scripts and styles within it.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' blob: data:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CLOSING_SECONDS = 3.0
"""So long the server's thread has to end."""


class _Headers:
    """Adds `HEADERS` to every answer. An ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def only_safe_decoders() -> None:
    """Let Pillow decode nothing but `FORMATS` in this process. Gradio opens every file by its content, and some of
    Pillow's decoders start other programs."""
    Image.init()
    for name in Image.OPEN.keys() - set(FORMATS):
        del Image.OPEN[name]
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]


@contextmanager
def serving(port: int, model: str) -> Iterator[str]:
    """Within the block, a thread answers at the yielded address. port: 0 for any free one. model: the first choice.

    Raises UserError if the port is taken.
    """
    only_safe_decoders()
    token, work = secrets.token_urlsafe(24), Work()
    names = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(_Headers)]
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None, middleware=names),
        page(work, model).queue(api_open=False),
        path=f"/{token}",
        max_file_size=MAX_FILE_BYTES,
        footer_links=[],
        ssr_mode=False,
        theme=THEME,
        show_error=False,
    )
    with listening(port) as listener:
        web = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", access_log=False))
        thread = threading.Thread(target=web.run, args=([listener],), name="app-server", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        finally:
            work.close()
            web.should_exit = True
            thread.join(timeout=CLOSING_SECONDS)
