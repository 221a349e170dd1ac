"""Fills in the files of `templates/`.

Invariants: values are escaped in HTML (Markdown has no such thing); control characters and lone surrogates in values
become blanks; a name that a template reads and nobody gave is an error.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _printable(value: object) -> object:
    """What is put in for `value`: its text without control characters; markup as it is."""
    return value if isinstance(value, Markup) else _CONTROL.sub(" ", str(value))


_TEMPLATES = Environment(
    loader=PackageLoader("resmaster_stages.publish"),
    autoescape=select_autoescape(disabled_extensions=("md",), default=True),
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def fill(template: str, /, **values: Any) -> str:
    """The file `template` of `templates/`, with `values` put in by their names."""
    return _TEMPLATES.get_template(template).render(values)


def verbatim(name: str) -> Markup:
    """The file `name` of `templates/` as a value that goes in unchanged."""
    assert _TEMPLATES.loader is not None
    return Markup(_TEMPLATES.loader.get_source(_TEMPLATES, name)[0])
