"""Answers for a root of many datasets: an overview at `/`, and the gallery of each dataset below `/NAME/`.

| Address | Answer |
|---|---|
| `/` | the overview, made anew if the last one is older than `OVERVIEW_SECONDS` |
| `/-/NAME` | the files of these pages; no dataset has the name `-` |
| `/NAME/...` | what `app.py` answers for the dataset NAME; at `/NAME/` a page that says why, if there is no gallery |

Invariants:
- NAME is looked up among the names below the root. It is never a path.
- A gallery is opened when it is first asked for, and anew when its dataset was published since. `GALLERIES` are open at
  a time, and none is closed while it answers.
- A dataset that cannot be shown costs the others nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset, dataset_in, no_dataset
from resmaster_stages.gallery.app import Server, as_error, no_such_address, sent_static, sure
from resmaster_stages.gallery.errors import NotThere
from resmaster_stages.gallery.gallery import open_gallery, say
from resmaster_stages.gallery.page import render_nothing, render_overview
from resmaster_stages.inspection.known import Known
from resmaster_stages.inspection.overview import Overview, folders_below, overview
from resmaster_stages.storage.filesystem import Folder

OVERVIEW_SECONDS = 20.0
"""An overview is kept for so long."""
GALLERIES = 4
"""Galleries that are open at a time. Each holds the manifest of its dataset on this machine's disk."""
STATIC = "-"

Value = TypeVar("Value")


@dataclass
class _Open:
    """A gallery that is open."""

    name: str
    server: Server
    version: str
    """Digest of the publication that it shows."""
    closing: ExitStack
    answering: int = 0
    dropped: bool = False
    """Whether it is to be closed as soon as it answers nobody."""

    def close(self) -> None:
        self.server.close()
        self.closing.close()


class RootServer:
    """Answers requests about the datasets of a root. `app` is an ASGI application, for one event loop."""

    def __init__(self, root: Folder, who: str, name: str = "view-") -> None:
        """who: whose choices they are. name: names of the threads begin so."""
        self._root, self._who, self._name = root, who, name
        self._known = Known()
        self._seen: tuple[float, Overview] | None = None
        self._threads = {kind: ThreadPoolExecutor(1, f"{name}{kind}") for kind in ("overview", "opening")}
        self._opening = asyncio.Lock()
        self._open: dict[str, _Open] = {}
        """By name. What was asked for last stands last."""
        self._own = Starlette(
            routes=[Route("/", self._page), Route(f"/{STATIC}/{{name:path}}", self._static)],
            exception_handlers={HTTPException: no_such_address},
        )

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"].lstrip("/")
        name, slash, rest = path.partition("/")
        if name in ("", STATIC):
            await self._own({**scope, "path": f"/{path}"}, receive, send)
        elif not slash:
            await RedirectResponse(f"./{name}/", 308)(scope, receive, send)
        else:
            inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode("utf-8", "surrogatepass")}
            await self._in_gallery(name, inner, receive, send)

    def close(self) -> None:
        """Begin no more work, and close the galleries."""
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for each in list(self._open.values()):
            each.close()

    async def _in(self, threads: str, work: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._threads[threads], work)

    # ------------------------------------------------------------------------------------------------------------------
    # the overview

    async def _page(self, request: Request) -> Response:
        return await self._in("overview", lambda: sure(self._overview, say, self._nothing("./")))

    async def _static(self, request: Request) -> Response:
        return sure(lambda: sent_static(request), say)

    def _overview(self) -> Response:
        if self._seen is None or self._seen[0] < time.monotonic():
            found = overview(self._root, self._known)
            self._seen = time.monotonic() + OVERVIEW_SECONDS, found
        return Response(render_overview(self._seen[1]), media_type="text/html")

    def _nothing(self, above: str) -> Callable[[str, int], Response]:
        """Makes a page that says why there is nothing to see. above: the address of the overview from there."""
        return lambda line, status: Response(
            render_nothing(self._root.url, line, above), status, media_type="text/html"
        )

    # ------------------------------------------------------------------------------------------------------------------
    # the galleries

    async def _in_gallery(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the gallery of a dataset answer."""
        page = scope["path"] == "/"
        try:
            found = await self._ready(name, page)
        except Exception as error:
            tell = self._nothing("../") if page else as_error
            await sure(_raises(error), say, tell)(scope, receive, send)
            return
        found.answering += 1
        try:
            await found.server.app(scope, receive, send)
        finally:
            found.answering -= 1
            if found.dropped:
                self._drop(found)

    async def _ready(self, name: str, page: bool) -> _Open:
        """The gallery of a dataset. page: whether it shall show the latest publication."""
        known = self._open.get(name)
        if known is None or page:
            async with self._opening:
                dataset, version = await self._in("opening", lambda: self._published(name))
                known = self._open.get(name)
                if known is None or known.version != version:
                    fresh = await self._in("opening", lambda: self._opened(dataset, version))
                    if known is not None:
                        self._drop(known)
                    known = fresh
        self._open.pop(name, None)
        self._open[name] = known
        for other in list(self._open)[:-GALLERIES]:
            self._drop(self._open.pop(other))
        return known

    def _drop(self, gallery: _Open) -> None:
        """Close a gallery, or let it be closed when it answers nobody any more."""
        gallery.dropped = True
        if not gallery.answering:
            with suppress(RuntimeError):  # the server ends, and closes all of them
                self._threads["opening"].submit(gallery.close)

    def _published(self, name: str) -> tuple[Dataset, str]:
        """A dataset below the root, and a digest of its publication."""
        if name not in folders_below(self._root):
            raise NotThere(f"{self._root.url}: there is no dataset {name!r}")
        folder = self._root.sub(name)
        present = folder.names("")
        if layout.CONFIG not in present:
            raise NotThere(f"{folder.url}: {no_dataset(present)}")
        if layout.MANIFEST not in present:
            raise NotThere(f"{folder.url}: nothing is published yet")
        publication = folder.read(layout.PUBLICATION) if layout.PUBLICATION in present else b""
        return dataset_in(folder), hashlib.sha256(publication).hexdigest()

    def _opened(self, dataset: Dataset, version: str) -> _Open:
        with ExitStack() as stack:
            gallery = stack.enter_context(open_gallery(dataset, self._who))
            return _Open(dataset.config.name, Server(gallery, self._name, among=True), version, stack.pop_all())


def _raises(error: Exception) -> Callable[[], Response]:
    def answer() -> Response:
        raise error

    return answer
