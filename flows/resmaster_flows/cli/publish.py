"""`resmaster publish`: writes what readers get again, from what is committed, and pushes the dataset to a hub.

Needs no Prefect and loads no model.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import UserError
from resmaster_stages.redaction import printable, quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.status import Status
    from resmaster_stages.publish.card import Publication
    from resmaster_stages.publish.hub import Repository

DESCRIPTION = (
    "Write manifest.parquet, index.json, README.md and report/ again from what is committed. A build does so at its "
    "end; use this if a build was broken off before, or if these files are damaged. With --to, also push what readers "
    "need to a dataset repository of the Hugging Face hub. Needs no Prefect."
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
    parser.add_argument(
        "--to",
        metavar="URL",
        help="push to hf://datasets/NAMESPACE/NAME, or ...@BRANCH; files that are there already are not sent again",
    )
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="only say what --to would send and delete")


def run(args: argparse.Namespace, console: Console) -> int:
    """Publish, print what was published, and push it. Returns 1 if that is nothing, or if too many samples failed; else
    0."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.status import status

    repository = _repository(args)
    dataset = open_dataset(args.root)
    if repository and args.dry_run:
        return _foresee(dataset, repository)
    published = publish_now(console, dataset, args.curated)
    if repository and published.samples:
        _push(console, dataset, repository, args.public)
    elif repository:
        say(console, f"{dataset.url}: no sample is published, so nothing was pushed", result=True)
    return judged(console, dataset, status(dataset)) or (0 if published.samples else 1)


def _repository(args: argparse.Namespace) -> Repository | None:
    """Where to push, or None. Raises UserError if the options do not fit together, or nobody is logged in."""
    if args.to is None:
        if args.public or args.dry_run:
            raise UserError("--public and --dry-run are about a push: add --to hf://datasets/NAMESPACE/NAME")
        return None
    from resmaster_stages.publish.hub import repository_of, require_token

    repository = repository_of(args.to)
    if not args.dry_run:
        require_token()
    return repository


def _foresee(dataset: Dataset, repository: Repository) -> int:
    """Print what a push would do. Returns 0."""
    from resmaster_stages.publish.hub import compare

    work, out = compare(dataset, repository, lenient=True), SafeConsole()
    table = Table("what", "files", "bytes", box=None, pad_edge=False)
    for what, files in (("send", work.due), ("there already", work.there)):
        table.add_row(what, f"{len(files):,}", f"{sum(file.bytes for file in files):,}")
    table.add_row("delete there", f"{len(work.deleted):,}", "")
    out.print(table)
    for name in work.deleted:
        say(out, f"delete: {name}")
    if work.unseen:
        say(out, f"what is there already is not known: {work.unseen}")
    elif not work.exists:
        say(out, f"{repository.url}: the repository is not there, or not shown; a push makes it")
    _warn(out, dataset)
    say(out, f"{repository.url}: nothing was sent")
    return 0


def _warn(console: Console, dataset: Dataset) -> None:
    """Say what others will see that a publisher may not expect."""
    from resmaster_stages.dataset import layout

    if dataset.folder.exists(layout.CURATION_TABLE):
        say(console, "curation.parquet tells readers who chose what, and why")
    if dataset.config.images:
        say(console, "the column source of manifest.parquet tells readers the path or address of each of your images")


def _push(console: Console, dataset: Dataset, repository: Repository, public: bool) -> None:
    """Push a published dataset, and show how far the push is."""
    from resmaster_flows.watch.pushing import pushing
    from resmaster_stages.publish.card import spell_bytes
    from resmaster_stages.publish.hub import compare, push

    work = compare(dataset, repository)
    size = sum(file.bytes for file in work.due)
    there = f" ({len(work.there):,} are there already)" if work.there else ""
    say(console, f"{repository.url}: sending {len(work.due):,} files, {spell_bytes(size)}{there}")
    _warn(console, dataset)
    with pushing(console, repository.url, size):
        address = push(dataset, work, public=public)
    if work.deleted:
        say(console, f"{len(work.deleted):,} files that no commit of the dataset names any more were deleted there")
    print(f"pushed: {printable(address)}")


def judged(console: Console, dataset: Dataset, found: Status) -> int:
    """Say whether too many samples of a dataset failed. Returns the exit status. found: its status."""
    from resmaster_stages.inspection.shortfall import shortfall

    lacking = shortfall(dataset, found)
    if lacking:
        say(console, lacking, result=True)
    return 1 if lacking else 0


def publish_now(console: Console, dataset: Dataset, curated: bool | None = None) -> Publication:
    """Publish in this process (curated: as in `publish`), and print what was published. Returns what was published."""
    from resmaster_stages.dataset import layout
    from resmaster_stages.publish.publish import publish

    published = publish(dataset, curated)
    say(console, f"{published.samples} samples of {published.shards} shards published in {dataset.url}", result=True)
    if published.shards_missing:
        say(
            console, f"{published.shards_missing} shards are not finished; next: resmaster repair {quoted(dataset.url)}"
        )
    print(f"report: {printable(dataset.folder.url_of(layout.REPORT_PAGE))}")
    return published
