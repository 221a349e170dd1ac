"""The report's page in a real browser: all images are there, its script works, and nothing is asked of the
network."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from resmaster_stages.dataset import layout
from resmaster_stages.publish.publish import publish
from tests.browser import Browser, chromium
from tests.inspection.test_explain import built, key_of

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def test_the_report(browser: Browser, tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a house", "bad high_res", "a <b>tree</b>"], tmp_path)
    publish(dataset)
    browser.open(Path(dataset.folder.full(layout.REPORT_PAGE)).as_uri())
    key = key_of(dataset, 0)
    text = browser.wait_for("2 samples", "a house", "a <b>tree</b>", "1 failed sample", "told to fail")
    assert f"resmaster view {dataset.url}" in text
    assert f"resmaster explain {dataset.url} {key}" in text
    images = "[...document.querySelectorAll('article img')]"
    assert browser.evaluate(f"{images}.length") == 8, "low-res, high-res and both zoomed, of two samples"
    assert browser.evaluate(f"{images}.every(image => image.complete && image.naturalWidth > 0)")
    asked = browser.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
    assert asked == 0

    browser.evaluate(
        "{ const find = document.querySelector('#find'); find.value = 'house'; find.dispatchEvent(new Event('input')) }"
    )
    assert "1 of 2" in browser.text()
    browser.click("Slider")
    assert browser.evaluate("document.body.classList.contains('slide')")
    browser.evaluate("document.querySelector('article:not([hidden]) .reveal').dispatchEvent(new Event('dblclick'))")
    assert browser.evaluate(
        "(dialog => dialog.open && dialog.querySelector('img').naturalWidth)(document.querySelector('dialog'))"
    )
    browser.evaluate("document.querySelector('dialog').close()")
    browser.evaluate("document.querySelector('article .command button').click()")
    assert browser.evaluate("getSelection().toString()").startswith("resmaster explain ")
