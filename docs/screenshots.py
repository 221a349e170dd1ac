"""Takes the images of docs/operating.md from the last build on a Prefect server, those of docs/curating.md from a
published dataset, or that of docs/app.md.

    python docs/screenshots.py --url http://127.0.0.1:4200 docs/images
    python docs/screenshots.py --view out/picturebook docs/images
    python docs/screenshots.py --app docs/images

Needs Chromium. The images of a build are its page, its contact sheet, and the samples of one of its runs over shards;
they need PREFECT_API_URL of the same server too, with PREFECT_API_AUTH_STRING if it asks for one. The images of a
dataset are the page of `resmaster view`: the list on a wide and on a narrow screen, and one sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.settings import get_current_settings

sys.path.insert(0, str(Path(__file__).parent.parent))
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.gallery.serve import serving
from tests.browser import Browser, chromium

IN_SIGHT = "[...document.querySelectorAll('#grid .high')].filter(e => e.getBoundingClientRect().top < innerHeight)"
LOADED = f"(images => images.length && images.every(image => image.naturalWidth))({IN_SIGHT})"
MOUSE = "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
"""A headless browser has no mouse, so buttons that appear under one would always be there."""


def take_view(root: str, folder: Path) -> None:
    """The images of the page over all samples. What is chosen for them is chosen in a copy."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(root, copy, dirs_exist_ok=True)
        shutil.rmtree(Path(copy) / "curation", ignore_errors=True)
        with serving(open_dataset(copy), 0, "") as url:
            with Browser(1400, 900, MOUSE) as browser:
                take_wide(browser, url, folder)
            with Browser(400, 800) as browser:
                browser.open(f"{url}#sort=agreement_psnr")
                browser.until(LOADED)
                browser.settle()
                browser.screenshot(folder / "view-narrow.jpg")


def take_wide(browser: Browser, url: str, folder: Path) -> None:
    """Choose about some samples, and take the list and one sample."""
    browser.open(f"{url}#sort=agreement_psnr")
    browser.until(LOADED)
    for key in ("j", "x", "a", "j", "4"):
        browser.key(key)
    browser.until("document.querySelector('#saved').innerText.trim() === 'saved'")
    browser.evaluate("document.querySelector('.threshold').scrollIntoView({block: 'center'})")
    set_value = "field.value = 30; field.dispatchEvent(new Event('input'))"
    browser.evaluate(f"(field => {{ {set_value} }})(document.querySelector('.threshold input'))")
    browser.until(
        "document.querySelector('.threshold output').textContent.startsWith('min_agreement_psnr 30 would flag')"
    )
    browser.until("document.querySelector('.threshold output').textContent.includes(' of ')")
    browser.until("document.querySelectorAll('.histogram canvas').length > 1")
    browser.settle()
    browser.screenshot(folder / "view.jpg")
    browser.evaluate("document.querySelector('#grid-0').click()")
    browser.wait_for("dataset index")
    at = browser.place("#sample .high .viewer", 0.42, 0.6)
    for _ in range(2):
        browser.mouse("mouseWheel", at, deltaX=0, deltaY=-120)
        browser.settle(1)
    browser.mouse("mouseMoved", (at[0] + 2, at[1]))
    browser.until("!document.querySelector('.under').hidden")
    browser.settle()
    browser.screenshot(folder / "view-sample.jpg")


def take_app(folder: Path) -> None:
    """The page of `resmaster app` after an image was made from a prompt and upscaled."""
    from resmaster_flows.app import serve

    prompt = json.dumps("a red house on a green meadow")
    fill = f"field.value = {prompt}; field.dispatchEvent(new Event('input', {{bubbles: true}}))"
    with serve.serving(0, "picturebook") as address, Browser(1400, 1000) as browser:
        browser.open(address)
        browser.wait_for("Make an image from the prompt", "Upscale")
        browser.evaluate(f"(field => {{ {fill} }})(document.querySelector('textarea'))")
        browser.click("Make an image from the prompt")
        browser.until("document.querySelector('img[src*=generated]')", 300)
        browser.click("Upscale")
        browser.wait_for("resmaster: 128 x 128 px to 512 x 512 px", seconds=600)
        browser.settle()
        browser.screenshot(folder / "app.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:4200", help="of the UI (default: %(default)s)")
    parser.add_argument("--view", metavar="ROOT", help="a published dataset to look through, instead of a build")
    parser.add_argument("--app", action="store_true", help="the page of `resmaster app`, instead of a build")
    args = parser.parse_args()
    if chromium() is None:
        sys.exit("there is no Chromium here; on Debian: apt-get install chromium")
    if args.app:
        return take_app(args.folder)
    if args.view:
        return take_view(args.view, args.folder)
    with get_client(sync_client=True) as client:
        builds = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["build-dataset"])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        if not builds:
            sys.exit(f"{args.url}: no build on this server; start one with: resmaster run CONFIG")
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[builds[0].id]))
        runs = [builds[0], *client.read_flow_runs(flow_run_filter=below)]
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs])),
            sort=ArtifactSort.CREATED_DESC,
        )
    password = get_current_settings().api.auth_string
    with Browser(1280, 900) as browser:
        if password is not None:  # where the UI keeps what was typed into its login
            browser.open(args.url)
            kept = f"localStorage.setItem('prefect-password', btoa({json.dumps(password.get_secret_value())}))"
            browser.command("Runtime.evaluate", expression=kept)
        browser.open(f"{args.url}/runs/flow-run/{builds[0].id}")
        browser.wait_for(builds[0].name, "Subflow Runs", "publish")
        browser.click("Artifacts")
        browser.wait_for("contact-sheet", "summary", "progress")
        browser.settle()
        browser.screenshot(args.folder / "run.jpg")
        for kind, image in (("-contact-sheet", "contact-sheet.jpg"), ("-run-samples", "run-samples.jpg")):
            shown = next(artifact for artifact in artifacts if (artifact.key or "").endswith(kind))
            browser.open(f"{args.url}/artifacts/artifact/{shown.id}")
            browser.wait_for(shown.key or "")
            browser.settle()
            browser.screenshot(args.folder / image)


if __name__ == "__main__":
    main()
