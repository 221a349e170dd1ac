"""Renders the pages of `resmaster view`, and finds the files that they load.

The page of a dataset is `templates/view.html`, with the scripts and styles in `static/`, and the look that it shares
with the report. It holds the dataset's name and no sample: its scripts ask the server for everything else. The page of
a root is `templates/overview.html`, which has no script.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from urllib.parse import quote

from resmaster_stages.inspection.overview import HEADINGS, Overview, cells, concern
from resmaster_stages.publish.template import fill_of, verbatim
from resmaster_stages.redaction import quoted, without_credentials

SHARED_STYLE = "look.css"
"""The file of the report's templates that the page loads as well."""
MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


def render_view(name: str, among: bool = False) -> str:
    """The page over all samples of the dataset `name`. among: whether an overview of several datasets is at `../`."""
    return fill_of(__package__, "view.html", name=name, among=among)


def render_overview(found: Overview) -> str:
    """The page over all datasets of a root."""
    rows = [
        {
            "cells": dict(zip(HEADINGS[1:], cells(numbers, found.seen)[1:], strict=True)),
            "name": numbers.name,
            "link": f"{quote(os.fsencode(numbers.name))}/" if numbers.publication.there else "",
            "share": int(100 * numbers.progress),
            "urgent": concern(numbers, found.seen).urgent,
        }
        for numbers in found.datasets
    ]
    return fill_of(
        __package__,
        "overview.html",
        root=without_credentials(found.root),
        headings=HEADINGS,
        rows=rows,
        count=found.count,
        unreadable=[each.line for each in found.unreadable],
        foreign=[each.line for each in found.foreign],
        seen=datetime.fromtimestamp(found.seen, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        estimated=any(numbers.estimated for numbers in found.datasets),
        command=f"resmaster run CONFIG --root {quoted(found.root)}",
    )


def render_nothing(title: str, line: str, above: str) -> str:
    """The page that stands where a gallery or the overview would be. line: why there is none. above: the address of the
    overview from there."""
    return fill_of(__package__, "nothing.html", title=without_credentials(title), line=line, above=above)


@cache
def _static_names() -> frozenset[str]:
    """The names of the files in `static/` and `static/vendor/`."""
    root = files(__package__) / "static"
    vendored = (f"vendor/{each.name}" for each in (root / "vendor").iterdir())
    return frozenset([*(each.name for each in root.iterdir() if each.is_file()), *vendored])


def static_file(name: str) -> tuple[bytes, str] | None:
    """(content, media type) of a file that the page loads; None if it loads no such file."""
    if name == SHARED_STYLE:
        return verbatim(SHARED_STYLE).encode(), MEDIA_TYPES[".css"]
    if name not in _static_names():
        return None
    path = files(__package__) / "static" / name
    return path.read_bytes(), MEDIA_TYPES[name[name.rindex(".") :]]
