"""Formats of exports, one file per format. `FORMATS` lists them in the order of the help."""

from __future__ import annotations

from resmaster_stages.publish.exports import ai_toolkit, fiftyone, folder, imagefolder, kohya, litdata, mds
from resmaster_stages.publish.exports.format import Format

FORMATS: list[Format] = [
    folder.FORMAT,
    imagefolder.FORMAT,
    kohya.FORMAT,
    ai_toolkit.FORMAT,
    mds.FORMAT,
    litdata.FORMAT,
    fiftyone.FORMAT,
]
"""Read this list when you need it, and keep no copy: formats from outside are appended after this module was
imported."""


def format_of(name: str) -> Format:
    """The format of this name, which must be listed."""
    return next(each for each in FORMATS if each.name == name)
