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
    lines = list(view_lines(dataset))
    until = datetime.now(UTC) + timedelta(seconds=SIGNED_SECONDS)
    try:
        signed = dataset.folder.signed_url(layout.REPORT_PAGE, SIGNED_SECONDS, "text/html; charset=utf-8")
    except (ResMasterError, OSError) as error:
        lines.append(f"the store signs no link to the report: {one_line(error)}")
    else:
        if signed:
            lines.insert(
                0,
                f"[open the report]({signed}): works until {until:%Y-%m-%d %H:%M} UTC, or until the credentials end "
                "that signed it. Whoever has the link can read the report",
            )
    return "\n".join(f"- {line}" for line in lines) + "\n"
