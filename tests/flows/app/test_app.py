"""`resmaster app`: what its buttons do, its server, and its page in a real browser, with the embedded model."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resmaster_flows.app.work import Asked, Work, mapping_of
from resmaster_stages import upscale
from resmaster_stages.config.method import methods
from resmaster_stages.errors import ResMasterError, UserError
from tests.browser import Browser, chromium

gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")

from resmaster_flows.app import serve  # noqa: E402
from resmaster_flows.app.page import number, settings_of  # noqa: E402
from resmaster_flows.cli.main import main  # noqa: E402

PROMPT = "a red house on a green meadow"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"
PPM = b"P6 1 1 255 abc"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "house.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.close()


@pytest.fixture
def asked(image: Path) -> Asked:
    return Asked(str(image), PROMPT, "picturebook", "resmaster", "default", scale=2, steps=2)


@contextmanager
def all_decoders_kept() -> Iterator[None]:
    """Other tests of this process may need the decoders that the page's process drops."""
    Image.init()
    kept, names = dict(Image.OPEN), list(Image.ID)
    try:
        yield
    finally:
        Image.OPEN.update(kept)
        Image.ID[:] = names


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with all_decoders_kept(), serve.serving(0, "picturebook") as address:
        yield address


def test_a_request_gives_what_the_library_gives(work: Work, asked: Asked, image: Path) -> None:
    seen: list[tuple[str, Image.Image | None]] = []
    made = work.upscale(asked, lambda line, preview: seen.append((line, preview)))
    same = upscale(image, PROMPT, scale=2, steps=2)
    assert made.high_res.tobytes() == same.tobytes()
    assert not made.stopped
    assert [line for line, _ in seen] == ["loading picturebook", "step 1 of 2", "step 2 of 2"]
    assert seen[1][1] is not None
    assert Image.open(made.file).tobytes() == same.tobytes()
    assert made.metrics["width"] == 128


def test_a_request_can_be_stopped_and_the_next_one_is_not(work: Work, asked: Asked) -> None:
    lines: list[str] = []

    def stop(line: str, preview: Image.Image | None) -> None:
        lines.append(line)
        if line.startswith("step"):
            work.stop()

    made = work.upscale(replace(asked, steps=8), stop)
    assert lines == ["loading picturebook", "step 1 of 6"]
    assert made.stopped
    assert made.high_res.size == (128, 128)
    assert not work.upscale(asked, lambda line, preview: None).stopped


def test_a_stop_from_another_thread_reaches_the_request(work: Work, asked: Asked) -> None:
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(
            work.upscale, replace(asked, steps=500), lambda line, preview: "step" in line and begun.set()
        )
        assert begun.wait(300)
        work.stop()
        assert made.result(300).stopped


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": None}, "no image yet"),
        ({"scale": 0.5}, "scale"),
        ({"steps": 0}, "steps"),
        ({"method": "resmastr"}, "did you mean"),
        ({"preset": "fast"}, "unknown preset"),
        ({"further": "stepz: 3"}, "did you mean"),
        ({"further": "- 3"}, "key: value"),
        ({"further": "a: [1"}, "no YAML in line"),
        ({"captions": "nobody/nothing"}, "nobody/nothing"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_mistake_is_one_line(work: Work, asked: Asked, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ResMasterError) as error:
        work.upscale(replace(asked, **change), lambda line, preview: None)
    assert words in str(error.value)


@pytest.mark.parametrize("content", [EPS, b"", b"\x89PNG\r\n\x1a\n damaged"])
def test_a_file_that_is_no_image_is_told(work: Work, asked: Asked, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evil.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"evil\.png"):
        work.upscale(replace(asked, image=str(path)), lambda line, preview: None)


def test_further_settings_overrule_the_fields(asked: Asked) -> None:
    settings = replace(asked, further="steps: 7\nstructure: {enabled: false}").settings()
    assert settings["steps"] == 7
    assert settings["structure"] == {"enabled": False}
    assert mapping_of("  ") == {}


def test_settings_that_a_method_has_not_are_left_out(asked: Asked) -> None:
    assert replace(asked, method="lanczos").settings() == {"method": "lanczos", "preset": "default", "scale": 2}


def test_an_image_is_made_from_a_prompt(work: Work) -> None:
    assert Image.open(work.generate(PROMPT, "picturebook", 3)).size == (128, 128)
    with pytest.raises(UserError, match="no prompt yet"):
        work.generate(" ", "picturebook", 3)


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_says_what_its_settings_are(name: str) -> None:
    text = settings_of(name)
    assert text.startswith(f"**{name}**: ")
    own = methods()[name].model_fields.keys() - {
        "method",
        "preset",
        "scale",
        "steps",
        "guidance_scale",
        "negative_prompt",
    }
    assert all(f"- `{field}`" in text for field in own)


def test_numbers_of_fields() -> None:
    assert number("Steps", "", int) is None
    assert number("Steps", " 20 ", int) == 20
    with pytest.raises(UserError, match=r"Steps: '2\.5' is no number"):
        number("Steps", "2.5", int)


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_who_knows_the_address_is_answered(address: str) -> None:
    root, token = address.rstrip("/").rsplit("/", 1)
    assert status(address) == 200
    assert status(f"{root}/") == status(f"{root}/{'x' * len(token)}/") == 404
    assert status(f"{root}/{token}/config", Host="evil.example") == 400


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_a_port_in_use_is_told(address: str) -> None:
    port = int(address.split(":")[2].split("/")[0])
    with all_decoders_kept(), pytest.raises(UserError, match="cannot be used"), serve.serving(port, "picturebook"):
        pass


def test_the_command_ends_in_one_line_for_a_port_that_it_cannot_have(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for port in ("80", "99999", address.split(":")[2].split("/")[0]):
        with all_decoders_kept():
            assert main(["app", "--port", port, "--no-open"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_safe_decoders_are_left_in_the_process_of_the_page() -> None:
    with all_decoders_kept():
        serve.only_safe_decoders()
        assert "EPS" not in Image.OPEN
        for content in (EPS, PPM):
            with pytest.raises(Image.UnidentifiedImageError):
                Image.open(io.BytesIO(content))


def choose(browser: Browser, path: Path) -> None:
    """Give the page's field for an image a file, as the browser's own dialog would."""
    root = browser.command("DOM.getDocument")["root"]["nodeId"]
    field = browser.command("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
    browser.command("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


def fill(browser: Browser, selector: str, text: str) -> None:
    """Write into a field, as a user would."""
    event = "dispatchEvent(new Event('input', {bubbles: true}))"
    browser.evaluate(
        f"(f => {{f.value = {json.dumps(text)}; f.{event}; f.blur()}})(document.querySelector({json.dumps(selector)}))"
    )


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium")
def test_the_page_in_a_browser(address: str, image: Path, tmp_path: Path) -> None:
    with Browser(1400, 1000) as browser:
        browser.watch()
        browser.open(address)
        browser.wait_for("Make an image from the prompt", "Upscale")
        browser.click("Upscale")
        browser.wait_for("Not done: there is no image yet")

        evil = tmp_path / "evil.png"
        evil.write_bytes(EPS)
        choose(browser, evil)
        browser.settle()
        assert browser.evaluate("document.querySelectorAll('img[src*=evil]').length") <= 1
        browser.open(address)
        browser.wait_for("Make an image from the prompt", "Upscale")

        choose(browser, image)
        browser.until("document.querySelector('img[src*=house]')")
        fill(browser, "#scale input", "2")
        browser.click("Settings")
        browser.until("document.querySelector('#steps input, #steps textarea')")
        fill(browser, "#steps input, #steps textarea", "many")
        browser.click("Upscale")
        browser.wait_for("Not done: Steps: 'many' is no number")
        fill(browser, "#steps input, #steps textarea", "4")
        browser.click("Upscale")
        browser.wait_for("resmaster: 64 x 64 px to 128 x 128 px", "PSNR", seconds=300)
        shown = browser.until("[...document.querySelectorAll('img')].map(i => i.src).filter(s => s.endsWith('.png'))")
        assert len(shown) >= 2

        browser.command("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.click("Save the result (PNG)")
        saved = tmp_path / "house-resmaster-2x.png"
        deadline = time.monotonic() + 60
        while not saved.exists():
            assert time.monotonic() < deadline, "the browser saved nothing"
            time.sleep(0.1)
        result = Image.open(saved)
        assert result.tobytes() == upscale(image, scale=2, steps=4).tobytes()

        fill(browser, "#steps input, #steps textarea", "400")
        browser.click("Upscale")
        browser.wait_for("of 280", seconds=300)
        browser.click("Stop")
        browser.wait_for("Stopped, unfinished: resmaster", seconds=300)
        assert [fault for fault in browser.faults if "manifest.json" not in fault and "favicon" not in fault] == []
