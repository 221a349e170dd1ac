"""What an operator sees in the UI of a build that workers did: read off the pages by a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact

from resmaster_flows.watch.artifacts import key_of
from resmaster_stages.dataset.dataset import open_dataset
from tests.browser import Browser, chromium
from tests.server.conftest import Stack, wait
from tests.server.stages import begun_by
from tests.server.test_operation import config, log

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium here; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def artifacts(stack: Stack, run: object) -> dict[str, Artifact]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    with stack.client() as client:
        return {artifact.key or "": artifact for artifact in client.read_artifacts(artifact_filter=wanted)}


def test_the_pages_of_a_build_on_workers(workers: Stack, browser: Browser, tmp_path: Path) -> None:
    run = workers.run(
        "build-dataset/resmaster-build", config={**config(tmp_path, ["a", "bad high_res", "c"]), "name": "pages"}
    )
    assert workers.ended(run).state_name == "Completed"
    (child,) = [each for each in workers.children(run) if each.name == "pages: shards 0"]
    ui = f"http://127.0.0.1:{workers.port}"

    browser.open(f"{ui}/runs/flow-run/{run}")
    browser.wait_for("build pages", "Completed", "dataset:pages", "method:resmaster", "model:picturebook")
    found = artifacts(workers, run)
    keyed = key_of(open_dataset(str(tmp_path / "out")), "")
    kinds = ("progress", "shards", "summary", "report", "contact-sheet")
    assert set(found) == {f"{keyed}-{what}" for what in kinds}
    said = wait(lambda: lines if "published" in str(lines := log(workers, run)) else [])
    assert "3 of 3 shards to do (low_res 3, captions 3, high_res 3, quality 3); 0 need nothing" in said
    assert f"submitted pages: shards 0: {ui}/runs/flow-run/{child.id}" in said
    assert f"published 2 samples; report: {tmp_path}/out/pages/report/index.html" in said
    browser.click("Artifacts")
    browser.wait_for(*found)

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-progress'].id}")
    browser.wait_for("3 of 3 shards", "100%")

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-shards'].id}")
    text = browser.wait_for("pages: shards 0", "pages: shards 1", "pages: shards 2", "Completed")
    assert f"/runs/flow-run/{child.id}" in text
    browser.wait_for("1 (shard 1: 1)")

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-summary'].id}")
    browser.wait_for("1 failed samples", "told to fail", "worst twentieth", "30.0 dB", "resmaster repair")
    assert browser.evaluate("document.querySelectorAll('table').length") >= 3, "Markdown tables are tables"

    assert images(browser, f"{ui}/artifacts/artifact/{found[f'{keyed}-contact-sheet'].id}", "worst first") == [1868]

    browser.open(f"{ui}/runs/flow-run/{child.id}")
    browser.wait_for("pages: shards 0", "shard 000000: high_res committed in", "dataset:pages", "model:picturebook")


def test_a_build_that_fails_says_why_in_one_sentence(workers: Stack, browser: Browser, tmp_path: Path) -> None:
    wanted = {**config(tmp_path, ["a"]), "name": "fails"}
    (tmp_path / "prompts.txt").unlink()
    run = workers.ended(workers.run("build-dataset/resmaster-build", config=wanted))
    assert run.state is not None
    assert run.state.name == "Failed"
    sentence = str(run.state.message)
    assert sentence.startswith(f"{tmp_path}/prompts.txt: ")
    assert "\n" not in sentence
    said = wait(lambda: lines if "in state Failed" in str(lines := log(workers, run.id)) else [])
    assert not any("Traceback" in line or "unexpected" in line for line in said)
    browser.open(f"http://127.0.0.1:{workers.port}/runs/flow-run/{run.id}")
    browser.wait_for("build fails", "Failed", f"Finished in state Failed({sentence!r})")


@pytest.mark.parametrize("version", ["", "/v2"])
def test_a_run_shows_its_samples_while_they_are_made(
    workers: Stack, browser: Browser, tmp_path: Path, version: str
) -> None:
    gate = tmp_path / "gate"
    wanted = config(tmp_path, ["a", "bad high_res", f"c until {gate}"], shards_per_run=1)
    run = workers.run("build-dataset/resmaster-build", config={**wanted, "name": "seen", "samples_per_shard": 3})
    wait(lambda: begun_by(gate))
    (child,) = workers.children(run)
    key = key_of(open_dataset(str(tmp_path / "out")), "run-samples")
    early = wait(lambda: found if (found := artifacts(workers, child.id).get(key)) and "told" in str(found.data) else 0)
    assert str(early.data).count("data:image/webp") == 2
    assert "c until" not in str(early.data), "the third sample of the shard"
    address = f"http://127.0.0.1:{workers.port}{version}/artifacts/artifact/{early.id}"
    assert images(browser, address, "told to fail", "1 failed samples") == [160, 324]
    gate.touch()
    assert workers.ended(run).state_name == "Completed"
    assert artifacts(workers, child.id)[key].id == early.id, "changed in place"


def images(browser: Browser, address: str, *words: str) -> list[int]:
    """The widths of the images of an artifact, as soon as its page has these words. Nothing may be wider than the
    page."""
    browser.open(address)
    browser.wait_for(*words)
    drawn = "[...document.querySelectorAll('img')].filter(image => image.src.startsWith('data:image/webp'))"
    browser.until(f"{drawn}.length && {drawn}.every(image => image.naturalWidth)")
    outside = f"{drawn}.some(image => image.getBoundingClientRect().right > innerWidth)"
    assert not browser.evaluate(f"document.documentElement.scrollWidth > innerWidth || {outside}")
    assert "data:image" not in browser.text()
    widths: list[int] = browser.evaluate(f"{drawn}.map(image => image.naturalWidth)")
    return widths
