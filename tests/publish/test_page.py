"""The report page and the contact sheets: complete, safe, deterministic, of bounded size, and of use without its
script."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image, ImageFilter

from resmaster_stages.metrics.detail import most_detailed
from resmaster_stages.metrics.flags import badness
from resmaster_stages.publish.page import ReportSample, choose, render_report, zoom
from resmaster_stages.publish.sheets import contact_sheet, contact_sheets
from resmaster_stages.publish.template import fill

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/a.png onerror=alert(1)>\x00 & ünï 漢"
FAILURE = {"key": "ff" * 12, "stage": "high_res", "error_class": "SampleError", "message": "NaN latents", "command": ""}


def some_image(size: int = 128, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    return Image.fromarray(values).filter(ImageFilter.GaussianBlur(size / 40))


def quality(**values: Any) -> dict[str, Any]:
    row = {"agreement_psnr": 31.25, "agreement_ssim": 0.97, "detail_energy": 0.0312, "seam": 1.02, "clipped": 0.01}
    row |= {"seam_worst": 0.0, "lost_worst": 0.2, "added_worst": 0.2, "colour_worst": 2.0}
    return {**row, "clip_score": None, "flags": [], **values}


def sample(key: str = "aa", seed: int = 0, **values: Any) -> ReportSample:
    high = some_image(128, seed)
    fields = {"prompt": f"prompt of {key}", "low_res": high.resize((32, 32)), "high_res": high, "quality": quality()}
    return ReportSample(key=key, **{**fields, **values})


def rows(texts: list[str], **values: Any) -> list[dict[str, Any]]:
    return [
        {
            "row": 0,
            "col": i,
            "y0": 0,
            "x0": 64 * i,
            "y1": 64,
            "x1": 64 * (i + 1),
            "caption": text,
            "status": "ok",
            **values,
        }
        for i, text in enumerate(texts)
    ]


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, the text, and what is style or script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.verbatim = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "img", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.text += data
        else:
            self.verbatim += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for name, a in self.tags if name == tag and (not kind or a.get("class") == kind)]


def page(*samples: ReportSample, **options: Any) -> Page:
    parsed = Page(render_report("demo", {"method": "resmaster"}, samples, **options))
    assert parsed.open == []
    return parsed


def test_a_sample_shows_both_images_a_zoom_of_both_and_its_facts() -> None:
    parsed = page(sample(captions=rows(["bricks", "leaves"]), quality=quality(flags=["seam"]), meta={"seed": 77}))
    assert len([a for a in parsed.all("img") if a["src"].startswith("data:image/webp")]) == 4
    for text in (
        "prompt of aa",
        "bricks",
        "leaves",
        "31.2 dB",
        "3.12%",
        "seam",
        "seed 77",
        "2 patch captions",
        "resmaster",
    ):
        assert text in parsed.text
    assert parsed.all("article")[0]["data-flags"] == "seam"


def test_everything_from_outside_is_escaped() -> None:
    dirty = sample(
        key=HOSTILE,
        prompt=HOSTILE,
        captions=rows([HOSTILE], status=HOSTILE),
        quality=quality(flags=[HOSTILE], seam=float("nan")),
        meta={HOSTILE: HOSTILE},
    )
    failure = dict.fromkeys(FAILURE, HOSTILE)
    html = render_report(HOSTILE, {HOSTILE: HOSTILE}, [dirty], [failure])
    parsed = Page(html)
    assert parsed.open == []
    assert len(parsed.all("script")) == 1
    assert len(parsed.all("img")) == 5  # two images, two zooms, the dialog's
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "\x00" not in html
    assert parsed.text.count("alert('x')") >= 9  # it is all there, as text


def test_hostile_text_arrives_in_every_field_as_it_is_and_changes_nothing_else() -> None:
    """Each field gets the same text with a name of its own, so that a field that lost or changed it is named."""
    nasty = """ "double" 'single' </script></style><b> & &lt; {{ title }} {% raw %} {# #} \\u003c \u2028 next\nline"""
    shown = nasty.replace("\n", " ").strip()

    def rendered(text: str) -> str:
        hostile = ReportSample(
            key="key" + text,
            prompt="prompt" + text,
            low_res=some_image(),
            high_res=some_image(),
            captions=rows(["caption" + text], status="status" + text, row="row" + text, col="col" + text),
            quality=quality(flags=["flag" + text]),
            meta={"fact" + text: "value" + text},
            command="command" + text,
        )
        broken = sample("broken" + text, high_res=b"not an image")
        failure = {name: f"failed {name}{text}" for name in FAILURE}
        return render_report("title" + text, {"label" + text: "content" + text}, [hostile, broken], [failure])

    html = rendered(nasty)
    parsed, harmless = Page(html), Page(rendered(" harmless"))
    of_page = ["title", "label", "content", "broken", *(f"failed {name}" for name in FAILURE)]
    of_sample = ["key", "prompt", "caption", "status", "row", "col", "flag", "fact", "value", "command"]
    for name in (*of_page, *of_sample):
        assert f"{name} {shown}" in parsed.text, name
    assert [a["alt"] for a in parsed.all("img")][:2] == [f"{kind}-res: prompt {shown}" for kind in ("low", "high")]
    assert parsed.all("article")[0]["data-flags"] == f"flag {shown}"
    assert [(tag, [*names]) for tag, names in parsed.tags] == [(tag, [*names]) for tag, names in harmless.tags]
    assert (parsed.verbatim, html.count("<script>")) == (harmless.verbatim, 1)


def test_a_name_that_a_template_reads_and_nobody_gave_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="header"):
        fill("card.md", name="demo", size_category="n<1K", data_files={})


def test_nothing_is_loaded_from_outside_and_the_policy_allows_just_the_pages_own_script() -> None:
    html = render_report("demo", {}, [sample(prompt="see https://example.com")])
    parsed = Page(html)
    for tag, attributes in parsed.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_the_worst_come_first_and_unmeasured_samples_last() -> None:
    parsed = page(
        sample("none", quality={}),
        sample("good", quality=quality(agreement_psnr=40.0)),
        sample("flagged", quality=quality(flags=["structure"])),
        sample("fair", quality=quality(agreement_psnr=25.0)),
    )
    assert [a["data-index"] for a in parsed.all("article")] == ["2", "3", "1", "0"]


def test_failures_are_listed_with_their_reasons() -> None:
    parsed = page(sample(), failures=[FAILURE])
    assert "1 failed sample" in parsed.text
    assert "NaN latents" in parsed.text
    assert "failed" not in page(sample()).text


def test_every_sample_and_failure_shows_the_command_that_tells_more() -> None:
    failure = {**FAILURE, "command": "resmaster explain 'my data' ff"}
    parsed = page(sample("aa", command="resmaster explain out/demo aa"), failures=[failure])
    assert "resmaster explain out/demo aa" in parsed.text
    assert "resmaster explain 'my data' ff" in parsed.text
    assert len(parsed.all("code")) == 2
    assert not page(sample()).all("code")


def test_a_page_without_samples_says_so() -> None:
    assert "No sample has passed every stage yet" in page().text


def test_a_broken_image_does_not_break_the_page() -> None:
    parsed = page(sample("bad", high_res=b"not an image"), sample("good"))
    assert "prompt of bad" in parsed.text
    assert "bad: not a readable image" in parsed.text
    assert len(parsed.all("article")) == 2


def test_captions_that_are_not_the_captioners_are_marked() -> None:
    parsed = page(sample(captions=[*rows(["a house"], status="fallback"), *rows(["b"], truncated=True)]))
    assert "1 with the global prompt" in parsed.text
    assert "a house global prompt" in parsed.text
    assert "b shortened" in parsed.text
    assert "neighbour" not in parsed.text


def test_patches_beyond_a_border_that_wraps_are_marked_up_to_the_border() -> None:
    wide = [{**row, "x0": 96, "x1": 160} for row in rows(["a house"], grid="64x128/64/32/horizontal")]
    (patch,) = page(sample(captions=wide)).all("li")[:1]
    assert patch["data-box"] == "left:75.000%;top:0.000%;width:25.000%;height:100.000%"


def test_captions_of_neighbours_are_marked_and_counted_apart() -> None:
    captions = [*rows(["a house"], status="fallback"), *rows(["bricks"], status="replaced"), *rows(["bricks"])]
    parsed = page(sample(captions=captions))
    assert "3 patch captions (row, column), 1 with the global prompt, 1 with a neighbour's caption" in parsed.text
    assert "bricks a neighbour's caption" in parsed.text


def test_equal_input_gives_equal_pages() -> None:
    first, second = (render_report("t", {}, [sample("aa", 1), sample("bb", 2)], [FAILURE]) for _ in range(2))
    assert first == second


def test_images_are_scaled_down_to_the_budget_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(budget_bytes: int) -> str:
        monkeypatch.setattr("resmaster_stages.publish.page.BUDGET_BYTES", budget_bytes)
        return render_report("t", {}, samples)

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8))
    samples = [sample("aa", low_res=some_image(64), high_res=noise)] * 3
    small, large = page(150_000), page(10_000_000)
    overhead = len(render_report("t", {}, []))
    assert len(small) - overhead < 150_000 + 3 * 5_000
    assert len(large) > 2 * len(small)
    assert largest_side(large) == 512
    assert largest_side(small) < 512


def largest_side(html: str) -> int:
    return max(
        max(Image.open(io.BytesIO(base64.b64decode(data))).size)
        for data in re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    )


def test_a_part_of_a_dataset_says_that_it_is_one() -> None:
    assert "1 of 900 samples are shown" in page(sample(), total=900).text
    assert "are shown" not in page(sample(), total=1).text


def test_the_command_that_shows_all_samples_is_at_the_top() -> None:
    parsed = page(sample(), total=900, view_command="resmaster view 'my data'")
    assert parsed.text.index("resmaster view 'my data'") < parsed.text.index("prompt of aa")
    assert len(parsed.all("code")) == 1
    assert "Look through all samples" not in page(sample()).text


def test_choose_keeps_the_worst_and_spreads_the_rest() -> None:
    bad = [badness(quality(agreement_psnr=30 + i / 100, flags=["seam"] if i % 50 == 7 else [])) for i in range(200)]
    chosen = choose(bad, 20)
    assert len(chosen) == 20
    assert chosen == sorted(set(chosen))
    assert {7, 57, 107, 157} <= set(chosen)
    assert choose(bad, 500) == list(range(200))
    assert len(choose(bad, 1)) == 1
    assert choose([], 5) == []
    with pytest.raises(ValueError, match="at least 1"):
        choose(bad, 0)


def test_the_most_detailed_place_is_where_the_texture_is() -> None:
    values = np.full((200, 320, 3), 120.0)
    values[:, 100:104] = 255  # a hard contour, which is not texture
    values[120:180, 210:270] += np.random.default_rng(0).normal(0, 25, (60, 60, 1))
    y0, x0, y1, x1 = most_detailed(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    assert (y1 - y0, x1 - x0) == (50, 50)
    assert 115 <= y0 <= 135
    assert 205 <= x0 <= 225
    assert most_detailed(Image.new("RGB", (6, 4))) == (0, 0, 4, 4)


def test_the_zoom_shows_one_place_of_both_images() -> None:
    high = some_image(128, 3)
    low = high.resize((32, 32), Image.Resampling.BOX)
    before, after = zoom(low, high, (40, 64, 72, 96))
    assert before.size == after.size == (32, 32)
    difference = np.abs(np.asarray(before).astype(float) - np.asarray(after)).mean()
    elsewhere = np.abs(np.asarray(zoom(low, high, (0, 0, 32, 32))[0]).astype(float) - np.asarray(after)).mean()
    assert difference < elsewhere / 2


def test_contact_sheets_hold_every_pair_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.publish.sheets.COLUMNS", 2)
    monkeypatch.setattr("resmaster_stages.publish.sheets.CELL_PX", 40)
    colours = ["red", "green", "blue"]
    samples = [sample(c, low_res=Image.new("RGB", (8, 8), c), high_res=Image.new("RGB", (64, 32), c)) for c in colours]
    sheet = contact_sheet(samples, "demo")
    found = [sheet.getpixel((12 + 20 + n % 2 * 96, 44 + 20 + n // 2 * 92)) for n in range(3)]
    assert found == [Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in colours]
    assert contact_sheet([sample(high_res=b"broken", prompt=HOSTILE * 5)], "demo").size[0] == sheet.size[0]


def test_contact_sheets_read_samples_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.publish.sheets.COLUMNS", 2)
    monkeypatch.setattr("resmaster_stages.publish.sheets.ROWS", 1)
    taken: list[int] = []

    def stream() -> Iterator[ReportSample]:
        for i in range(5):
            taken.append(i)
            yield sample(str(i))

    sheets = contact_sheets(stream(), "demo")
    next(sheets)
    assert taken == [0, 1]
    assert len(list(sheets)) == 2
    assert list(contact_sheets([], "demo")) == []
