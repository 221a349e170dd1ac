"""The files of the page of `resmaster view`, without a browser: all are there, nothing is inline, names are escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from resmaster_stages.gallery.page import render_view, static_file
from resmaster_stages.publish.page import render_report
from resmaster_stages.publish.template import verbatim
from tests.checkout import ROOT
from tests.test_security import ATTACKS, elements, sample, shape


class Page(HTMLParser):
    """The addresses that a page loads, and the texts of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline = ""
        self._within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        named = dict(attrs)
        self.loaded += [str(named[name]) for name in ("src", "href") if name in named]

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.inline += data


def imports(script: str) -> list[str]:
    return re.findall(r"from '\./([^']+)'", script)


def test_every_file_that_the_page_loads_is_there_and_nothing_is_inline() -> None:
    page = Page(render_view("demo"))
    assert page.inline.strip() == ""
    loaded = [name.removeprefix("static/") for name in page.loaded if name.startswith("static/")]
    assert set(page.loaded) - {f"static/{name}" for name in loaded} == {"data:,", "api/choices.csv"}
    seen: set[str] = set()
    while loaded:
        name = loaded.pop()
        found = static_file(name)
        assert found is not None, name
        seen.add(name)
        loaded += [other for other in imports(found[0].decode()) if other not in seen]
    assert {"look.css", "view.js", "zoom.js", "vendor/openseadragon.min.js", "vendor/uplot.min.js"} <= seen


def test_lines_fit() -> None:
    """No formatter sees to these files."""
    folder = ROOT / "resmaster_stages" / "gallery"
    files = [*(folder / "static").glob("*.*"), *(folder / "templates").glob("*")]
    assert len(files) > 15
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("name", ["openseadragon", "uplot"])
def test_vendored_libraries_have_their_licence(name: str) -> None:
    found = static_file(f"vendor/{name}.LICENSE.txt")
    assert found is not None
    assert b"Permission is hereby granted" in found[0] or b"Redistribution and use" in found[0]


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "../page.py", "vendor", "vendor/../view.js", "/etc/passwd", "look.css/"]
)
def test_no_other_file_is_served(name: str) -> None:
    assert static_file(name) is None


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_hostile_name_adds_no_element_and_no_attribute(attack: str) -> None:
    assert shape(render_view(attack)) == shape(render_view("demo"))
    assert not any(name.startswith("on") for _, attributes in elements(render_view(attack)) for name in attributes)


def test_the_page_has_the_parts_of_the_report() -> None:
    """As templates, which its scripts fill in."""
    page = render_view("demo")
    for part, element in {"command": "div", "flag": "li", "metric": "div", "patch": "li"}.items():
        assert f'<template id="{part}-part"><{element}' in page
    report = render_report("demo", {}, [sample("text")], view_command="resmaster view demo")
    for shared in ('<div class="command"><code>', "<dt>PSNR ↑</dt>", '<li data-box="'):
        assert shared in report
    assert '<div class="command"><code></code><button type="button">Copy</button></div>' in page
    assert static_file("look.css") == (verbatim("look.css").encode(), "text/css; charset=utf-8")
    assert verbatim("look.css") in report
