"""Says how to open a published dataset: its report, and the page over all its samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ResMasterError
from resmaster_stages.redaction import one_line, printable, quoted, without_credentials

VIEW_URL = "RESMASTER_VIEW_URL"
"""Environment variable with the address of a running `resmaster view` over the root of the dataset."""
SIGNED_SECONDS = 24 * 3600
"""So long a signed link to a report works."""
SESSION_TOKEN = "X-Amz-Security-Token"


def view_lines(dataset: Dataset) -> Iterator[str]:
    """Lines of Markdown: how to look through the samples, and where the report is."""
    name = dataset.folder.url.rstrip("/").rpartition("/")[2]
    address = os.environ.get(VIEW_URL, "").strip().rstrip("/")
    if address.startswith(("http://", "https://")):
        yield f"[look through all samples]({address}/{quote(name)}/)"
    elif address:
        yield f"{VIEW_URL} has no http:// or https://, so there is no link to all samples"
    yield f"look through all samples on your own machine: `resmaster view {quoted(dataset.url)}`"
    yield f"report: `{printable(without_credentials(dataset.folder.url_of(layout.REPORT_PAGE)))}`"


def report_page(dataset: Dataset) -> str:
    """A page of Markdown with all ways to open the dataset. On S3 it has a signed link to the report, too."""
    return "\n".join(f"- {line}" for line in (*_signed_lines(dataset), *view_lines(dataset))) + "\n"


def _signed_lines(dataset: Dataset) -> Iterator[str]:
    """A line with a signed link to the report, or why there is none; nothing if the store cannot sign at all."""
    until = datetime.now(UTC) + timedelta(seconds=SIGNED_SECONDS)
    try:
        signed = dataset.folder.signed_url(layout.REPORT_PAGE, SIGNED_SECONDS, "text/html; charset=utf-8")
    except (ResMasterError, OSError) as error:
        yield f"no signed link to the report: {one_line(error)}"
        return
    if signed and SESSION_TOKEN in signed:
        yield "no signed link to the report, because it would hold the token of temporary credentials"
    elif signed:
        yield (
            f"[open the report]({signed}): works until {until:%Y-%m-%d %H:%M} UTC. Whoever has the link can read the "
            "report"
        )
