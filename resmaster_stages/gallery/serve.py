"""Listens on this machine's loopback address, and gives the address with its token."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import uvicorn

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import UserError
from resmaster_stages.gallery.app import Server
from resmaster_stages.gallery.gallery import open_gallery
from resmaster_stages.gallery.guard import Guard
from resmaster_stages.gallery.listener import HOST, listening
from resmaster_stages.gallery.root import RootServer
from resmaster_stages.storage.filesystem import Folder

TOKEN = re.compile(r"[A-Za-z0-9_-]{32,200}")
CLOSING_SECONDS = 3.0
"""So long the threads of a server have to end."""
CONNECTIONS = 200
"""More requests at a time are refused. A browser sends six."""


@contextmanager
def serving(place: Dataset | Folder, port: int, who: str, token: str = "") -> Iterator[str]:
    """Within the block, a thread answers at the yielded address.

    place: a dataset, or a root of datasets. port: 0 for any free one. who: whose choices they are. token: "" for a
    random one. Raises UserError if the port is taken, or the token is easy to guess, and as `sample_table` does.
    """
    if token and not TOKEN.fullmatch(token):
        raise UserError("the token is too easy to guess, or cannot stand in an address; give 32 or more of A-Za-z0-9_-")
    with listening(port) as listener, ExitStack() as stack:
        port, token = listener.getsockname()[1], token or secrets.token_urlsafe(24)
        server: Server | RootServer
        if isinstance(place, Dataset):
            server = Server(stack.enter_context(open_gallery(place, who)), _threads(port))
        else:
            server = RootServer(place, who, _threads(port))
        config = uvicorn.Config(
            Guard(server.app, token, port),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        web = uvicorn.Server(config)
        thread = threading.Thread(target=web.run, args=([listener],), name="view-server", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{port}/{token}/"
        finally:
            web.should_exit = True
            server.close()
            thread.join(timeout=CLOSING_SECONDS)


def at_work(address: str) -> bool:
    """Whether a thread of the server that was at `address` still waits, for a store that does not answer. Python would
    wait for the thread before it ends."""
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(_threads(urlsplit(address).port))]
    for thread in ours:
        thread.join(timeout=CLOSING_SECONDS / len(ours))
    return any(thread.is_alive() for thread in ours)


def _threads(port: int | None) -> str:
    """How the names of the threads of a server begin."""
    return f"view-{port}-"
