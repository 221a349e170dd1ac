"""Renders the files of `templates/`.

Invariants:
- Values are escaped in HTML, but not in Markdown.
- Control characters, marks that turn the direction of text, and lone surrogates in values become blanks.
- A name that a template reads and that is not given is an error.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from resmaster_stages.redaction import CONTROLS


def _printable(value: object) -> object:
    """The text of `value` without control characters. Markup stays unchanged."""
    return value if isinstance(value, Markup) else CONTROLS.sub(" ", str(value))


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
    """Render the file `template` of `templates/` with `values` by name."""
    return _TEMPLATES.get_template(template).render(values)


def verbatim(name: str) -> Markup:
    """The content of the file `name` of `templates/`, as a value that is inserted unchanged."""
    assert _TEMPLATES.loader is not None
    return Markup(_TEMPLATES.loader.get_source(_TEMPLATES, name)[0])
