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
from tests.server.conftest import Stack
from tests.server.test_operation import config

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
    assert set(found) == {f"{keyed}-{what}" for what in ("progress", "shards", "summary", "contact-sheet")}
    browser.click("Artifacts")
    browser.wait_for(*found)

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-progress'].id}")
    browser.wait_for("3 of 3 shards", "100%")

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-shards'].id}")
    text = browser.wait_for("pages: shards 0", "pages: shards 1", "pages: shards 2", "Completed")
    assert f"/runs/flow-run/{child.id}" in text

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-summary'].id}")
    browser.wait_for("1 failed samples", "told to fail", "worst twentieth", "30.0 dB", "resmaster repair")
    assert browser.evaluate("document.querySelectorAll('table').length") >= 3, "Markdown tables are tables"

    browser.open(f"{ui}/artifacts/artifact/{found[f'{keyed}-contact-sheet'].id}")
    browser.wait_for("worst first")
    sheet = "[...document.querySelectorAll('img')].find(image => image.src.startsWith('data:image/webp'))"
    assert browser.evaluate(f"{sheet}.decode().then(() => {sheet}.naturalWidth)") > 400

    browser.open(f"{ui}/runs/flow-run/{child.id}")
    browser.wait_for("pages: shards 0", "shard 000000: high_res committed in", "dataset:pages", "model:picturebook")
