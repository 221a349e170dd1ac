"""Takes the images of docs/operating.md from the last build on a Prefect server.

    python docs/screenshots.py --url http://127.0.0.1:4200 docs/images

Needs Chromium, and PREFECT_API_URL of the same server, with PREFECT_API_AUTH_STRING if it asks for one. The images: the
build's page, and its contact sheet.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowFilter,
    FlowFilterName,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import get_current_settings

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.browser import Browser, chromium


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:4200", help="of the UI (default: %(default)s)")
    args = parser.parse_args()
    if chromium() is None:
        sys.exit("there is no Chromium here; on Debian: apt-get install chromium")
    with get_client(sync_client=True) as client:
        builds = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["build-dataset"])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        if not builds:
            sys.exit(f"{args.url}: no build on this server; start one with: resmaster run CONFIG")
        sheets = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[builds[0].id]), type=ArtifactFilterType(any_=["image"])
            )
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
        for sheet in sheets[:1]:
            browser.open(f"{args.url}/artifacts/artifact/{sheet.id}")
            browser.wait_for(sheet.key or "")
            browser.settle()
            browser.screenshot(args.folder / "contact-sheet.jpg")


if __name__ == "__main__":
    main()
