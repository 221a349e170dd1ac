"""Renders the files of `templates/`, and those of another package that shares them.

Invariants:
- Values are escaped in HTML, but not in Markdown.
- Characters in values that act without being seen are visible escapes; tabs and line breaks become blanks.
- A name that a template reads and that is not given is an error.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from resmaster_stages.redaction import printable

_BREAKS = re.compile(r"[\t\n\r]")


def _shown(value: object) -> object:
    """The text of `value` without what acts unseen. Markup stays unchanged."""
    return value if isinstance(value, Markup) else printable(_BREAKS.sub(" ", str(value)))


_TEMPLATES = Environment(
    loader=PackageLoader("resmaster_stages.publish"),
    autoescape=select_autoescape(disabled_extensions=("md",), default=True),
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def fill(template: str, /, **values: Any) -> str:
    """Render the file `template` of `templates/` with `values` by name."""
    return _TEMPLATES.get_template(template).render(values)


def fill_of(package: str, template: str, /, **values: Any) -> str:
    """Render the file `template` of `templates/` in `package`. It may import from the files here."""
    assert _TEMPLATES.loader is not None
    return (
        _TEMPLATES.overlay(loader=ChoiceLoader([PackageLoader(package), _TEMPLATES.loader]))
        .get_template(template)
        .render(values)
    )


def verbatim(name: str) -> Markup:
    """The content of the file `name` of `templates/`, as a value that is inserted unchanged."""
    assert _TEMPLATES.loader is not None
    return Markup(_TEMPLATES.loader.get_source(_TEMPLATES, name)[0])
