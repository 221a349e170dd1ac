"""`resmaster publish`: writes what readers get again, from what is committed. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import say
from resmaster_stages.redaction import printable, quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.status import Status
    from resmaster_stages.publish.card import Publication

HELP = "write manifest, index, card and report again"
DESCRIPTION = (
    "Write manifest.parquet, index.json, README.md and report/ again from what is committed. A build does so at its "
    "end; use this if a build was broken off before, or if these files are damaged. Needs no Prefect."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument(
        "--curated",
        action=argparse.BooleanOptionalAction,
        help="also write curated.json, an index of shards without the samples that somebody rejected; shards with "
        "rejected samples are copied without these. A later publication does so, too, until --no-curated",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Publish, and print what was published. Returns 1 if that is nothing, or if too many samples failed; else 0."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.status import status

    dataset = open_dataset(args.root)
    published = publish_now(console, dataset, args.curated)
    return judged(console, dataset, status(dataset)) or (0 if published.samples else 1)


def judged(console: Console, dataset: Dataset, found: Status) -> int:
    """Say whether too many samples of a dataset failed. Returns the exit status. found: its status."""
    from resmaster_flows.shortfall import shortfall

    lacking = shortfall(dataset, found)
    if lacking:
        say(console, lacking)
    return 1 if lacking else 0


def publish_now(console: Console, dataset: Dataset, curated: bool | None = None) -> Publication:
    """Publish in this process (curated: as in `publish`), and print what was published. Returns what was published."""
    from resmaster_stages.dataset import layout
    from resmaster_stages.publish.publish import publish

    published = publish(dataset, curated)
    say(console, f"{published.samples} samples of {published.shards} shards published in {dataset.url}")
    if published.shards_missing:
        say(
            console, f"{published.shards_missing} shards are not finished; next: resmaster repair {quoted(dataset.url)}"
        )
    print(f"report: {printable(dataset.folder.url_of(layout.REPORT_PAGE))}")
    return published
