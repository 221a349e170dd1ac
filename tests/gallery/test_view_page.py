"""The page of `resmaster view` in a real browser, before the real server: lists of any length, filters, histograms,
zoom, captions, keys and choices, on a wide and on a narrow screen, with hostile texts."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.curation import read_choices
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.errors import SampleError
from resmaster_stages.gallery.serve import serving
from resmaster_stages.inspection.choice_files import read_choice_file
from resmaster_stages.publish.publish import publish
from resmaster_stages.redaction import printable
from resmaster_stages.runner.run import run_stage
from tests.browser import Browser, chromium
from tests.fake_stages import FAKES, planned
from tests.gallery.standin import key_of, prompt_of, standin
from tests.test_security import ATTACKS

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium"),
    pytest.mark.timeout(300),
]

SAMPLES = 100_000
SIDE = 2048
WIDE, NARROW = (1400, 900), (400, 800)
TILES = "[...document.querySelectorAll('#grid .tile:not(.blank)')]"
SELECTED = "document.querySelector('#grid [aria-selected=true]')"


@dataclass(frozen=True)
class Page:
    """A browser and the address of a server."""

    browser: Browser
    url: str

    def open(self, fragment: str = "", **view: Any) -> None:
        """Open the page anew, with a view."""
        self.leave()
        self.browser.open(f"{self.url}#{fragment or urlencode(view, doseq=True)}")
        self.browser.until("document.querySelector('#count')?.textContent")
        self.browser.evaluate("performance.setResourceTimingBufferSize(10_000)")  # for `requests`

    def leave(self) -> None:
        """Leave the page. It asks its server for nothing from then on."""
        self.browser.open("about:blank")
        self.browser.until("location.href === 'about:blank'")

    def ask(self, name: str, **parameters: Any) -> Any:
        """What the server answers to the page."""
        with urllib.request.urlopen(f"{self.url}api/{name}?{urlencode(parameters, doseq=True)}") as answer:
            return json.load(answer)

    def requests(self) -> list[str]:
        """The addresses of all that the page has loaded, without the server's own."""
        names = self.browser.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        return [str(name).removeprefix(self.url) for name in names]

    def until_tiles(self) -> None:
        """Wait until all tiles that are in sight show a sample."""
        options = "[...document.querySelectorAll('#grid [role=option]')]"
        self.browser.until(f"(tiles => tiles.length && tiles.every(tile => tile.filled))({options})")

    def fill(self, selector: str, value: str, event: str = "input") -> None:
        """Set the value of a field, as typing does (`change`: as leaving the field does)."""
        set_value = f"field.value = {json.dumps(value)}; field.dispatchEvent(new Event('{event}'))"
        self.browser.evaluate(f"(field => {{ {set_value} }})(document.querySelector({json.dumps(selector)}))")

    def text(self, selector: str) -> str:
        """The text of the first element of a selector."""
        return str(self.browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def view(self) -> str:
        """The part of the address that holds the view."""
        return str(self.browser.evaluate("decodeURIComponent(location.hash)"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(*WIDE) as browser:
        browser.watch()
        yield browser


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("many")
    return standin(folder / "out", folder, SAMPLES, SIDE, captioned=1000)


@pytest.fixture(scope="module")
def address(many: Dataset) -> Iterator[str]:
    with serving(many, 0, "tester") as url:
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page over 100,000 samples. A test fails if anything goes wrong in the page that it does not take out."""
    browser.faults.clear()
    browser.resize(*WIDE)
    yield (page := Page(browser, address))
    page.leave()
    assert browser.faults == []


# ----------------------------------------------------------------------------------------------------------------------
# the list


def test_any_place_of_100000_samples_is_reached_with_few_elements_and_requests(page: Page) -> None:
    page.open(sort="index")
    page.until_tiles()
    assert page.text("#count") == "100,000 samples"
    for share in (0.3, 0.9, 0.5, 1):
        page.browser.evaluate(
            f"(grid => {{ grid.scrollTop = {share} * grid.scrollHeight }})(document.querySelector('#grid'))"
        )
        page.browser.until("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        page.until_tiles()
        assert page.browser.evaluate("document.querySelectorAll('#grid [role=option]').length") < 60
    last = f"{TILES}.find(tile => tile.getAttribute('aria-posinset') === '{SAMPLES}')"
    assert prompt_of(SAMPLES - 1) in page.browser.until(f"{last}?.textContent")
    page.browser.until(f"{last}.querySelector('.high').naturalWidth > 0")
    assert len([name for name in page.requests() if name.startswith("api/samples")]) <= 10


def test_a_place_in_the_list_comes_back_after_a_reload(page: Page) -> None:
    page.open(sort="-agreement_psnr")
    page.until_tiles()
    page.browser.evaluate("document.querySelector('#grid').scrollTop = 1_000_000")
    at = page.browser.until("(found => found && Number(found[1]))(location.hash.match(/at=(\\d+)/))")
    assert at > 10_000
    page.browser.evaluate("location.reload()")
    page.browser.until(f"document.querySelector('#grid-{at}')?.filled")
    top = page.browser.evaluate(f"document.querySelector('#grid-{at}').getBoundingClientRect().top")
    assert top == pytest.approx(
        page.browser.evaluate("document.querySelector('#grid').getBoundingClientRect().top"), abs=4
    )
    assert f"at={at}" in page.view()


@pytest.mark.parametrize(("sort", "sign"), [("agreement_psnr", 1), ("-agreement_psnr", -1), ("seam", 1)])
def test_sorting(page: Page, sort: str, sign: int) -> None:
    page.open(sort="index")
    page.until_tiles()
    page.fill("#sort", sort, "change")
    first = page.ask("samples", sort=sort, limit=1)["samples"][0]
    page.browser.until(f"{TILES}[0]?.querySelector('.prompt').textContent === {json.dumps(printable(first['prompt']))}")
    shown = page.browser.evaluate(f"{TILES}.map(tile => tile.querySelector('.value').textContent)")
    values = [float(text.split()[1]) for text in shown]
    assert len(values) > 10
    assert values == sorted(values, key=lambda value: sign * value)
    assert f"sort={sort}" in page.view()


def test_search_flags_and_expressions_filter_and_chips_take_them_away(page: Page) -> None:
    page.open()
    page.until_tiles()
    page.fill("#find", "misty bridge")
    page.browser.until("document.querySelector('#count').textContent.includes(' of ')")
    expected = page.ask("count", q="misty bridge")["total"]
    page.browser.until(f"document.querySelector('#count').textContent === '{expected:,} of 100,000'")
    page.browser.evaluate("document.querySelector('#flags [value=seam]').click()")
    expected = page.ask("count", q="misty bridge", flag="seam")["total"]
    page.browser.until(f"document.querySelector('#count').textContent === '{expected:,} of 100,000'")
    assert page.browser.evaluate(f"{TILES}.every(tile => tile.textContent.includes('seam'))")
    page.browser.evaluate("document.querySelector('#active button').click()")
    page.browser.evaluate("document.querySelector('#active button').click()")
    page.browser.until("document.querySelector('#count').textContent === '100,000 samples'")

    page.fill("#where", "agreement_psnr <")
    said = page.browser.until("document.querySelector('#where-error').textContent")
    assert "agreement_psnr <" in said
    assert page.browser.evaluate("document.querySelector('#where').getAttribute('aria-invalid')") == "true"
    page.fill("#where", "agreement_psnr < 20 and seam > 3")
    expected = page.ask("count", where="agreement_psnr < 20 and seam > 3")["total"]
    assert 0 < expected < SAMPLES
    page.browser.until(f"document.querySelector('#count').textContent === '{expected:,} of 100,000'")
    assert page.text("#where-error") == ""
    page.fill("#where", "agreement_psnr > 1000")
    page.browser.wait_for("No sample passes the filters.")
    page.browser.evaluate("document.querySelector('#empty .clear-all').click()")
    page.browser.until("document.querySelector('#count').textContent === '100,000 samples'")
    refused = [fault for fault in page.browser.faults if "400" in fault]
    assert refused == page.browser.faults, "the browser reports the refused expression, and nothing else"
    page.browser.faults.clear()


# ----------------------------------------------------------------------------------------------------------------------
# histograms and thresholds


def test_a_drag_over_a_histogram_filters_and_a_click_takes_the_filter_away(page: Page) -> None:
    page.open()
    plot = "[aria-label='Values of PSNR'] .plot"
    page.browser.evaluate(f'document.querySelector("{plot}").scrollIntoView({{block: "center"}})')
    page.browser.until(f'document.querySelector("{plot} .u-over")')
    page.browser.drag(page.browser.place(plot, 0.25), page.browser.place(plot, 0.5))
    pattern = "/range=agreement_psnr:([^:]+):([^&]+)/"
    found = f"(found => found && found.slice(1))(decodeURIComponent(location.hash).match({pattern}))"
    low, high = map(float, page.browser.until(found))
    column = next(each for each in page.ask("dataset")["columns"] if each["name"] == "agreement_psnr")
    spread = column["max"] - column["min"]
    assert low == pytest.approx(column["min"] + 0.25 * spread, abs=0.02 * spread)
    assert high == pytest.approx(column["min"] + 0.5 * spread, abs=0.02 * spread)
    expected = page.ask("count", range=f"agreement_psnr:{low}:{high}")["total"]
    assert 0 < expected < SAMPLES
    page.browser.until(f"document.querySelector('#count').textContent === '{expected:,} of 100,000'")
    at = page.browser.place(plot, 0.8)
    page.browser.drag(at, at)
    page.browser.until("document.querySelector('#count').textContent === '100,000 samples'")
    assert "range" not in page.view()


def test_a_threshold_says_what_it_would_flag_and_how_it_is_written(page: Page) -> None:
    page.open()
    threshold = ".threshold:has([aria-label=min_agreement_psnr])"
    page.browser.evaluate(f"document.querySelector('{threshold}').scrollIntoView({{block: 'center'}})")
    (known,) = [each for each in page.ask("dataset")["thresholds"] if each["field"] == "min_agreement_psnr"]
    for value in (known["value"], 30):
        page.fill(f"{threshold} input", str(value))
        flagged = page.ask("count", where=f"agreement_psnr < {value}")["total"]
        assert 0 < flagged < SAMPLES
        sentence = f"min_agreement_psnr {value:g} would flag {flagged:,} of 100,000"
        page.browser.until(f"document.querySelector('{threshold} output').textContent === {json.dumps(sentence)}")
        line = yaml.safe_load(page.text(f"{threshold} code"))
        assert parse_config({"name": "demo", **line}).quality.min_agreement_psnr == value
    page.browser.evaluate(f"document.querySelector('{threshold} .row > button').click()")
    page.browser.until(f"document.querySelector('#count').textContent === '{flagged:,} of 100,000'")


# ----------------------------------------------------------------------------------------------------------------------
# one sample


def open_sample(page: Page, index: int = 5) -> None:
    page.open(sort="index", at=index, key=key_of(index))
    page.browser.until("document.querySelector('.caption-count').textContent")
    page.browser.until("document.querySelector('.scale').textContent")


def test_both_images_are_zoomed_to_single_pixels_by_tiles_and_never_loaded_whole(page: Page) -> None:
    open_sample(page)
    page.browser.key("z")
    page.browser.until("document.querySelector('.scale').textContent === '100%'")
    page.browser.until("performance.getEntriesByType('resource').some(entry => entry.name.includes('/high/tile/11/'))")
    page.browser.until("performance.getEntriesByType('resource').some(entry => entry.name.includes('/low/tile/9/'))")
    asked = [name for name in page.requests() if f"image/{key_of(5)}/" in name]
    assert not [name for name in asked if "/file" in name]
    finest = {name for name in asked if "/high/tile/11/" in name}
    assert 0 < len(finest) < (SIDE // 512) ** 2, "only the tiles in sight"
    assert f"{key_of(5)}" in page.text(".panel .key")


FRAME = "new Promise(done => requestAnimationFrame(() => done(document.querySelector('#sample .high .mark'))))"
BOX = f"{FRAME}.then(mark => JSON.stringify(mark?.getBoundingClientRect()))"
RESTING = f"(async () => {{ const box = await {BOX}; return box && box === await {BOX} && box === await {BOX} }})()"
"""A patch is outlined, and does not move any more."""


def edges(page: Page, side: str) -> list[float]:
    """Where the outlined patch lies in one of the views."""
    box = f"document.querySelector('#sample .{side} .mark').getBoundingClientRect()"
    view = f"document.querySelector('#sample .{side} .viewer').getBoundingClientRect()"
    values = page.browser.evaluate(f"((b, v) => [b.left - v.left, b.top - v.top, b.width, b.height])({box}, {view})")
    return [float(value) for value in values]


def test_zoom_and_place_are_the_same_in_both_images_and_in_the_slider(page: Page) -> None:
    open_sample(page)
    at = page.browser.place("#sample .low .viewer", 0.3, 0.5)
    for _ in range(6):
        page.browser.mouse("mouseWheel", at, deltaX=0, deltaY=-120)
    page.browser.until("parseInt(document.querySelector('.scale').textContent) > 30")
    page.browser.drag(at, (at[0] + 40, at[1] + 25))
    page.browser.until("document.querySelector('.under').textContent.startsWith('corner')")
    page.browser.until(RESTING)
    assert edges(page, "low") == pytest.approx(edges(page, "high"), abs=1)
    scale = page.text(".scale")
    page.browser.key("c")
    page.browser.until("document.querySelector('.pair').classList.contains('slide')")
    page.browser.until("document.querySelector('.low .viewer').clientWidth > 900")
    page.browser.mouse("mouseMoved", page.browser.place("#sample .high .viewer", 0.9, 0.5))
    page.browser.until("document.querySelector('.high .mark')")
    page.browser.until(RESTING)
    assert page.text(".scale") == scale
    assert edges(page, "low") == pytest.approx(edges(page, "high"), abs=1)
    page.browser.drag(page.browser.place(".handle"), page.browser.place("#sample .high .viewer", 0.25))
    assert float(page.browser.evaluate("document.querySelector('.curtain').value")) == pytest.approx(25, abs=2)
    clip = page.browser.evaluate("getComputedStyle(document.querySelector('.low .viewer')).clipPath")
    assert "inset" in clip
    assert "compare=curtain" in page.view()


def test_captions_follow_the_pointer_and_the_list_outlines_patches(page: Page) -> None:
    open_sample(page)
    assert page.text(".caption-count") == "4 patch captions (row, column)"
    viewer = "#sample .high .viewer"
    for x, y, corner in ((0.2, 0.4, "00"), (0.8, 0.4, "01"), (0.2, 0.6, "10"), (0.8, 0.6, "11")):
        page.browser.mouse("mouseMoved", page.browser.place(viewer, x, y))
        page.browser.until(f"document.querySelector('.under').textContent.startsWith('corner {corner} of')")
        assert page.browser.evaluate("document.querySelector('.patches li.on').textContent").count(f"corner {corner}")
        assert page.browser.evaluate("document.querySelectorAll('#sample .mark').length") == 2
    page.browser.mouse("mouseMoved", page.browser.place(".patches li"))
    page.browser.until("document.querySelector('.under').textContent.startsWith('corner 00 of')")
    page.browser.mouse("mouseMoved", page.browser.place(".panel .key"))
    page.browser.until("document.querySelector('.under').hidden && !document.querySelector('#sample .mark')")


def test_a_sample_opens_moves_on_and_closes_by_keys_and_by_the_back_button(page: Page) -> None:
    page.open(sort="index")
    page.until_tiles()
    page.browser.evaluate("document.querySelector('#grid').focus()")
    page.browser.key("j")
    page.browser.key("Enter")
    page.browser.until(f"location.hash.includes('{key_of(1)}')")
    assert "2 of 100,000" in page.browser.wait_for("2 of 100,000", "dataset index")
    page.browser.key("j")
    page.browser.wait_for("3 of 100,000")
    assert key_of(2) in page.view()
    page.browser.evaluate("history.back()")
    page.browser.until("document.querySelector('#sample').hidden")
    assert page.browser.evaluate(f"{SELECTED}.id") == "grid-2", "the list stands where one was"
    page.browser.key("Enter")
    page.browser.until("!document.querySelector('#sample').hidden")
    page.browser.evaluate("location.reload()")
    page.browser.wait_for("3 of 100,000")
    page.browser.key("Escape")
    page.browser.until("document.querySelector('#sample').hidden")
    assert "key=" not in page.view()


# ----------------------------------------------------------------------------------------------------------------------
# choices


def test_keys_choose_and_undo_and_do_nothing_while_somebody_types(page: Page) -> None:
    page.open(sort="index", at=2000)
    page.until_tiles()
    page.browser.evaluate("document.querySelector('#grid').focus()")
    for key in ("x", "a", "4", "x", "u", "u"):  # the second undo takes back the rating
        page.browser.key(key)
    page.browser.until("document.querySelector('#saved').innerText.trim() === 'saved'")
    tally = page.ask("dataset")["choices"]
    assert tally == {"kept": 1, "rejected": 1, "rated": 0}
    assert page.text("#tally") == "1 kept · 1 rejected · 0 rated"
    verdicts = page.browser.evaluate(
        "[2000, 2001, 2002].map(n => document.querySelector(`#grid-${n}`).dataset.verdict)"
    )
    assert verdicts == ["rejected", "kept", "none"]
    page.browser.key("/")
    page.browser.until("document.activeElement.id === 'find'")
    for key in ("x", "u", "3", "?"):
        page.browser.key(key)
    assert page.browser.evaluate("document.querySelector('#find').value") == "xu3?"
    assert not page.browser.evaluate("document.querySelector('#help').open")
    page.browser.key("Escape")
    page.browser.key("?")
    page.browser.until("document.querySelector('#help').open")
    page.browser.evaluate("document.querySelector('#help').close()")
    page.browser.evaluate("document.querySelector('#undo').click(); document.querySelector('#undo').click()")
    page.browser.until("document.querySelector('#tally').textContent === 'nothing chosen yet'")


def test_ratings_verdicts_and_reasons_of_an_open_sample(page: Page) -> None:
    open_sample(page, 30)
    page.browser.key("3")
    page.fill(".panel .reason", "soft", "change")
    page.browser.evaluate("document.querySelector('.verdicts [value=rejected]').click()")
    page.browser.until("document.querySelector('#saved').innerText.trim() === 'saved'")
    found = page.ask(f"sample/{key_of(30)}")
    assert (found["verdict"], found["rating"], found["reason"]) == ("rejected", 3, "soft")
    page.browser.key("0")
    page.browser.until("document.querySelector('#tally').textContent === 'nothing chosen yet'")
    found = page.ask(f"sample/{key_of(30)}")
    assert (found["verdict"], found["rating"], found["reason"]) == ("none", None, "")
    page.browser.evaluate("document.querySelector('[data-act=undo]').click()")
    page.browser.until("document.querySelector('#tally').textContent.includes('1 rejected')")
    page.browser.key("x")  # already rejected: goes on
    page.browser.until(f"location.hash.includes('{key_of(31)}')")
    page.browser.evaluate("history.back()")


def test_a_list_of_undecided_samples_loses_what_is_decided_and_skips_none(page: Page) -> None:
    page.open(sort="index", verdict="none", where="index >= 500")
    page.until_tiles()
    page.browser.evaluate("document.querySelector('#grid').focus()")
    total = page.ask("count", verdict="none", where="index >= 500")["total"]
    for _ in range(5):
        page.browser.key("x")
    page.browser.until(f"document.querySelector('#count').textContent.startsWith('{total - 5:,} of')")
    page.browser.until(f"{SELECTED}?.textContent.includes('number 505')")
    assert page.browser.evaluate(f"{SELECTED}.id") == "grid-0"
    for _ in range(5):
        page.browser.key("u")
    page.browser.until(f"document.querySelector('#count').textContent.startsWith('{total:,} of')")


def test_choices_wait_for_a_server_that_is_away_and_are_kept_over_its_restart(browser: Browser, tmp_path: Path) -> None:
    dataset = standin(tmp_path / "out", tmp_path, 50)
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    with serving(dataset, 0, "tester") as url:
        page = Page(browser, url)
        page.open(sort="index")
        page.until_tiles()
        browser.evaluate("document.querySelector('#grid').focus()")
        browser.command("Network.enable")
        browser.command("Network.emulateNetworkConditions", offline=True, **offline)
        browser.key("x")
        browser.wait_for("1 choice not saved, will be tried again", "is `resmaster view` still running?")
        assert page.text("#grid-0 .badge") == "✕ rejected"
        assert list(read_choices(dataset.folder)) == []
        page.fill("#find", "house")  # a filter that needs the server loses nothing either
        browser.evaluate("URL.createObjectURL = blob => { window.kept = blob; return 'data:,' }")
        browser.evaluate("document.querySelector('#unsaved-csv').click()")
        (tmp_path / "kept.csv").write_text(browser.evaluate("window.kept.text()"))
        (kept,) = read_choice_file(str(tmp_path / "kept.csv"), "tester", "2026-11-29T00:00:00+00:00", {})
        assert (kept.key, kept.verdict, kept.rating) == (key_of(0), "rejected", None)
        browser.command("Network.emulateNetworkConditions", offline=False, **offline)
        browser.until("document.querySelector('#saved').innerText.trim() === 'saved'")
        (choice,) = read_choices(dataset.folder).values()
        assert (choice.key, choice.verdict) == (key_of(0), "rejected")
    with serving(dataset, 0, "tester") as url:
        page = Page(browser, url)
        page.open(verdict="rejected")
        page.until_tiles()
        assert page.text("#count") == "1 of 50"
        assert prompt_of(0) in browser.evaluate(f"{TILES}[0].textContent")
        page.leave()
    assert all("ERR_INTERNET_DISCONNECTED" in fault or "ERR_CONNECTION_REFUSED" in fault for fault in browser.faults)
    browser.faults.clear()


# ----------------------------------------------------------------------------------------------------------------------
# near-duplicates and failures


def test_of_near_duplicates_one_is_kept_and_the_others_are_rejected(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = standin(tmp_path / "out", tmp_path, 20)
    with_groups(dataset, {4: 2, 7: 2, 9: 8}, monkeypatch)
    with serving(dataset, 0, "tester") as url:
        page = Page(browser, url)
        page.open(mode="duplicates")
        browser.wait_for("2 groups", "3 near-duplicates", "2 near-duplicates")
        browser.until("document.querySelectorAll('#groups .member').length === 5")
        browser.evaluate(f"document.querySelector('[data-key=\"{key_of(4)}\"] .keep-one').click()")
        browser.until("document.querySelector('#tally').textContent === '1 kept · 2 rejected · 0 rated'")
        browser.evaluate("document.querySelector('#groups').focus()")
        browser.key("j")
        browser.key("a")
        browser.until("document.querySelector('#tally').textContent === '2 kept · 3 rejected · 0 rated'")
        choices = {choice.key: choice for choice in read_choices(dataset.folder).values()}
        kept = {key for key, choice in choices.items() if choice.verdict == "kept"}
        assert kept == {key_of(4), key_of(8)}
        assert choices[key_of(2)].reason == f"near-duplicate of {key_of(4)}"
        browser.evaluate("document.querySelector('#groups .as-list').click()")
        browser.until("document.querySelector('#count').textContent === '3 of 20'")
        page.leave()
    assert browser.faults == []


def with_groups(dataset: Dataset, first_of: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write into the manifest which sample (number -> number) is a near-duplicate of which."""
    path = dataset.folder.full(layout.MANIFEST)
    name, schema = "near_duplicate_of", manifest_schema()
    if name not in schema.names:
        schema = schema.append(pa.field(name, pa.string()))
        monkeypatch.setattr("resmaster_stages.inspection.query.manifest_schema", lambda: schema)
    table = pq.read_table(path)
    firsts = [key_of(first_of[number]) if number in first_of else None for number in table["index"].to_pylist()]
    columns = {**{column: table[column] for column in table.column_names}, name: pa.array(firsts, pa.string())}
    pq.write_table(pa.table({column: columns[column] for column in schema.names}, schema), path)


def hostile_stage(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The stand-in of low_res, whose errors quote the prompt."""
    for output, sample in zip(FAKES["low_res"](config, samples), samples):
        yield replace(output, error=SampleError(f"refused {sample.prompt}")) if output.error else output


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset whose prompts, captions, negative prompts and errors are attacks."""
    folder = tmp_path_factory.mktemp("hostile")
    prompts = [attack for attack in ATTACKS if attack.isprintable()]
    prompts += ["\u202eturned \u2066text\u2069", "bad low_res <script>alert(1)</script><img src=x onerror=alert(1)>"]
    dataset = planned(folder / "out", prompts, folder, samples_per_shard=50)
    for stage, process in {**FAKES, "low_res": hostile_stage}.items():
        run_stage(dataset, stage, 0, process=process)
    publish(dataset)
    return dataset


def test_hostile_texts_are_shown_as_they_are_and_do_nothing(browser: Browser, hostile: Dataset) -> None:
    browser.faults.clear()
    with serving(hostile, 0, "tester") as url:
        page = Page(browser, url)
        page.open(sort="index")
        page.until_tiles()
        listed = page.ask("samples", sort="index", limit=200)["samples"]
        assert len(listed) > 9
        shown = browser.evaluate("[...document.querySelectorAll('#grid .prompt')].map(element => element.textContent)")
        assert shown == [printable(sample["prompt"]) for sample in listed[: len(shown)]]
        for sample in listed:
            page.open(sort="index", key=sample["key"])
            browser.until("document.querySelector('.caption-count').textContent")
            text = printable(sample["prompt"])
            assert page.text(".panel .prompt") == text
            assert page.text(".patches li div").strip() == text
            page.fill(".panel .reason", sample["prompt"], "change")
            browser.until("document.querySelector('#saved').innerText.trim() === 'saved'")
        page.open(mode="failed")
        failed = browser.wait_for("1 failed sample", "refused bad low_res <script>alert(1)</script>")
        assert "resmaster explain" in failed
        page.open(q=ATTACKS[1])
        browser.wait_for("1 of")
        assert ATTACKS[1] in page.text("#active")
        strange = "iframe, base, math, svg, script:not([src]), img[src=x], [onerror], [onload]"
        assert browser.evaluate(f"document.querySelectorAll('{strange}').length") == 0
        page.leave()
    assert browser.faults == []


# ----------------------------------------------------------------------------------------------------------------------
# narrow screens


def test_on_a_narrow_screen_nothing_overflows_and_everything_can_be_touched(page: Page) -> None:
    page.browser.resize(*NARROW)
    fits = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    touched = "[...document.querySelectorAll('button, select, input:not(.curtain)')]"
    small = (
        f"{touched}.filter(element => element.checkVisibility() && !element.closest('[inert]'))"
        ".filter(element => element.getBoundingClientRect().height < 39.5).map(element => element.outerHTML)"
    )
    page.open(sort="index", q="house")
    page.until_tiles()
    assert page.browser.evaluate(fits)
    assert page.browser.evaluate(small) == []
    assert page.browser.evaluate("getComputedStyle(document.querySelector('#filters')).display") == "none"
    page.browser.evaluate("document.querySelector('#filters-button').click()")
    page.browser.until("document.querySelector('#filters').getBoundingClientRect().width === innerWidth")
    assert page.browser.evaluate(fits)
    assert page.browser.evaluate(small) == []
    page.browser.evaluate("document.querySelector('#filters-close').click()")
    page.browser.evaluate(f"{TILES}[0].click()")
    page.browser.until("document.querySelector('.caption-count').textContent")
    page.browser.until("document.querySelector('.scale').textContent")
    assert page.browser.evaluate("document.querySelector('.pair').classList.contains('slide')"), "on a phone, one image"
    assert page.browser.evaluate(fits)
    assert page.browser.evaluate("document.querySelector('#sample').scrollWidth <= innerWidth")
    assert page.browser.evaluate(small) == []
