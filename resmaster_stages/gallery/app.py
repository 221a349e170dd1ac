"""The addresses of the server, each with what answers it. `guard.py` stands before them.

| Address | Answer |
|---|---|
| `/` and `/static/NAME` | the page and its files |
| `/api/...` | JSON; an error is `{"error": "what to do"}` |
| `/image/KEY/low|high/...` | thumbnails, tiles and stored files |

Invariants:
- A key in an address is looked up in the manifest, and a name among the page's files. Neither is ever a path.
- Whatever a request makes fail, the server answers, and goes on.
- Questions, expressions of the user, images and choices each have threads of their own, so that none keeps the others
  waiting.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.gallery.errors import NotThere, Unreadable
from resmaster_stages.gallery.filters import limit_of, offset_of
from resmaster_stages.gallery.gallery import Gallery
from resmaster_stages.gallery.guard import BODY_BYTES
from resmaster_stages.gallery.images import THUMB_PX
from resmaster_stages.gallery.page import render_view, static_file
from resmaster_stages.gallery.samples import finite
from resmaster_stages.redaction import one_line

THREADS = {"questions": 4, "expressions": 2, "images": 3, "choices": 1}
KEPT = "private, max-age=31536000, immutable"
"""For images whose address names their version."""

Answer = Callable[[Request], Response]


class Server:
    """Answers requests about one gallery."""

    def __init__(self, gallery: Gallery, name: str = "view-", among: bool = False) -> None:
        """name: names of the threads begin so. among: whether an overview of several datasets is at `../`."""
        self._gallery, self._among = gallery, among
        self._threads = {kind: ThreadPoolExecutor(count, f"{name}{kind}") for kind, count in THREADS.items()}
        image = "/image/{key}/{kind}"
        self.app = Starlette(
            routes=[
                self._route("/", self._page),
                self._route("/static/{name:path}", sent_static),
                self._route("/api/dataset", self._json(lambda request: gallery.about())),
                self._route("/api/samples", self._json(lambda request: gallery.samples.page(request.query_params))),
                self._route("/api/count", self._json(lambda request: gallery.samples.count(request.query_params))),
                self._route(
                    "/api/histogram", self._json(lambda request: gallery.samples.histogram(request.query_params))
                ),
                self._route("/api/sample/{key}", self._json(lambda request: gallery.sample(_text(request, "key")))),
                self._route("/api/near_duplicates", self._json(self._near_duplicates)),
                self._route("/api/failed", self._json(self._failed)),
                self._route("/api/choices.csv", self._csv),
                Route("/api/choices", self._choose, methods=["POST"]),
                self._route(f"{image}/thumb/{{px}}", self._thumb, "images"),
                self._route(f"{image}/tile/{{level}}/{{place}}", self._tile, "images"),
                Route(f"{image}/file", self._file),
            ],
            exception_handlers={HTTPException: no_such_address},
        )

    def close(self) -> None:
        """Begin no more work."""
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _route(self, path: str, answer: Answer, threads: str = "questions") -> Route:
        async def endpoint(request: Request) -> Response:
            name = "expressions" if request.query_params.get("where") else threads
            return await self._in(name, lambda: answer(request))

        return Route(path, endpoint)

    def _json(self, ask: Callable[[Request], Any]) -> Answer:
        return lambda request: as_json(ask(request))

    async def _in(self, threads: str, answer: Callable[[], Response]) -> Response:
        """Answer in a thread of a kind. An error becomes an answer too."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads[threads], lambda: sure(answer, self._gallery.say))

    # ------------------------------------------------------------------------------------------------------------------
    # the page

    def _page(self, request: Request) -> Response:
        return Response(render_view(self._gallery.name, self._among), media_type="text/html")

    # ------------------------------------------------------------------------------------------------------------------
    # data

    def _near_duplicates(self, request: Request) -> dict[str, Any]:
        return self._gallery.near_duplicates(offset_of(request.query_params), limit_of(request.query_params))

    def _failed(self, request: Request) -> dict[str, Any]:
        return self._gallery.failed.page(offset_of(request.query_params), limit_of(request.query_params))

    def _csv(self, request: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="choices.csv"'}
        return Response(self._gallery.choices.as_csv(), media_type="text/csv", headers=headers)

    async def _choose(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_BYTES:  # a length that was not told beforehand
                return as_json({"error": f"the request is longer than {BODY_BYTES} bytes; send less at a time"}, 413)
        return await self._in("choices", lambda: self._chosen(bytes(body)))

    def _chosen(self, body: bytes) -> Response:
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON ({one_line(error)})") from error
        return as_json({"choices": self._gallery.choices.add(asked)})

    # ------------------------------------------------------------------------------------------------------------------
    # images

    def _thumb(self, request: Request) -> Response:
        place, cache = self._image(request)
        px = next((px for px in THUMB_PX if str(px) == _text(request, "px")), None)
        if px is None:
            raise NotThere(f"thumbnails have {', '.join(map(str, THUMB_PX))} px; reload the page")
        return Response(self._gallery.images.thumb(place, px), media_type="image/jpeg", headers=cache)

    def _tile(self, request: Request) -> Response:
        place, cache = self._image(request)
        try:
            level, column, row = map(_number, (_text(request, "level"), *_text(request, "place").split("_", 1)))
        except ValueError:
            raise NotThere("a tile is LEVEL/X_Y; reload the page") from None
        return Response(self._gallery.images.tile(place, level, column, row), media_type="image/jpeg", headers=cache)

    async def _file(self, request: Request) -> Response:
        answer = await self._in("images", lambda: self._stored(request))
        if not isinstance(answer, _Stored):
            return answer
        loop, pool = asyncio.get_running_loop(), self._threads["images"]

        async def pieces() -> AsyncIterator[bytes]:
            yield answer.first
            while piece := await loop.run_in_executor(pool, next, answer.rest, b""):
                yield piece

        return StreamingResponse(pieces(), headers=dict(answer.headers))

    def _stored(self, request: Request) -> Response:
        place, cache = self._image(request)
        rest = self._gallery.images.pieces(place)
        first = next(rest, b"")  # an error of the first piece is still an answer
        headers = {**cache, "Content-Type": place.media_type, "Content-Length": str(place.bytes)}
        return _Stored(first, rest, headers)

    def _image(self, request: Request) -> tuple[Any, dict[str, str]]:
        """The place of the image of an address, and how long a browser may keep the answer."""
        found, version = self._gallery.samples.images_of(_text(request, "key"))
        kind = _text(request, "kind")
        if kind not in found:
            raise NotThere("images are low or high; reload the page")
        return found[kind], {"Cache-Control": KEPT if request.query_params.get("v") == version else "private, no-cache"}


class _Stored(Response):
    """The beginning of a stored file, and what gives the rest."""

    def __init__(self, first: bytes, rest: Iterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self.first, self.rest = first, rest
        del self.headers["content-length"]
        self.headers["Content-Length"] = headers["Content-Length"]


def as_json(value: Any, status: int = 200) -> Response:
    """An answer with JSON, in which only ASCII stands."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def as_error(line: str, status: int) -> Response:
    """An error as JSON."""
    return as_json({"error": line}, status)


def sure(
    answer: Callable[[], Response],
    say: Callable[[str], None],
    tell: Callable[[str, int], Response] = as_error,
) -> Response:
    """An answer, whatever happens. say: prints a problem of the dataset or of ours. tell: makes an answer of one."""
    try:
        return answer()
    except UserError as error:
        return tell(one_line(error), 400)
    except NotThere as error:
        return tell(one_line(error), 404)
    except (ResMasterError, OSError) as error:
        say(one_line(error))
        return tell(one_line(error), 502 if isinstance(error, Unreadable | OSError) else 500)
    except Exception as error:  # a fault of ours costs one answer, not the server
        text = f"this is a fault of resmaster view: {type(error).__name__}: {one_line(error)}"
        say(text)
        return tell(text, 500)


def sent_static(request: Request) -> Response:
    """A file that a page loads."""
    found = static_file(_text(request, "name"))
    if found is None:
        raise NotThere("the page has no such file; reload the page")
    return Response(found[0], headers={"Content-Type": found[1], "Cache-Control": "private, no-cache"})


async def no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return as_json({"error": "there is no such address here; reload the page"}, error.status_code)


def _text(request: Request, name: str) -> str:
    """A part of the address."""
    return str(request.path_params[name])


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(text)
    return int(text)
