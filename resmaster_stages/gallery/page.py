"""Renders the page of `resmaster view`, and finds the files that it loads.

The page is `templates/view.html`, the scripts and styles in `static/`, and the look that it shares with the report. It
holds the dataset's name and no sample: its scripts ask the server for everything else.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from resmaster_stages.publish.template import fill_of, verbatim

SHARED_STYLE = "look.css"
"""The file of the report's templates that the page loads as well."""
MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


def render_view(name: str) -> str:
    """The page over all samples of the dataset `name`."""
    return fill_of(__package__, "view.html", name=name)


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
