"""Flow `overview`: one table over all datasets of a root, as an artifact of the Prefect UI. Changes nothing.

A schedule keeps the table up to date. The versions of the artifact are its history.
"""

from __future__ import annotations

import os

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from resmaster_flows.form import ROOT
from resmaster_flows.plugins import load_plugins
from resmaster_stages.dataset.dataset import Dataset, dataset_or_root
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.overview import HEADINGS, Overview, cells, concern, overview
from resmaster_stages.redaction import printable, without_credentials

load_plugins()

KEY = "resmaster-overview"
"""Key of the artifact."""


@flow(name="overview", description="One table over all datasets of a root: what needs attention first.")
def overview_of(root: str | None = None) -> int:
    """Show all datasets directly below a root. Returns how many of them need attention.

    Args:
        root: A folder, or `s3://bucket/prefix`. Default: the environment's RESMASTER_ROOT.
    """
    root = root or os.environ.get(ROOT)
    if not root:
        raise UserError(f"root: give a folder or s3://bucket/prefix, or deploy with {ROOT}")
    place = dataset_or_root(root)
    if isinstance(place, Dataset):
        raise UserError(f"{place.url}: is one dataset; give the root above it: {place.url.rpartition('/')[0]}")
    found = overview(place)
    create_table_artifact(key=KEY, table=rows(found), description=description(found))
    log = get_run_logger()
    for other in found.others:
        log.warning("%s", other.line)
    urgent = [numbers for numbers in found.datasets if concern(numbers, found.seen).urgent]
    for numbers in urgent:
        log.warning("%s: %s", printable(numbers.name), concern(numbers, found.seen).text)
    log.info("%s: %s, of which %d need attention", found.root, found.count, len(urgent) + len(found.unreadable))
    return len(urgent) + len(found.unreadable)


def rows(found: Overview) -> list[dict[str, str]]:
    """The rows of the table: datasets that cannot be read, and then the others."""
    unreadable = [{HEADINGS[0]: printable(each.name), HEADINGS[1]: "cannot be read"} for each in found.unreadable]
    known = [dict(zip(HEADINGS, cells(numbers, found.seen), strict=True)) for numbers in found.datasets]
    return [dict.fromkeys(HEADINGS, "") | row for row in (*unreadable, *known)]


def description(found: Overview) -> str:
    """What stands above the table, in Markdown."""
    lines = [f"`{printable(without_credentials(found.root))}`: {found.count}"]
    lines += [f"- {each.line}" for each in found.others]
    if any(numbers.estimated for numbers in found.datasets):
        lines.append("- `~` is an estimate from some of the records")
    return "\n".join(lines)
