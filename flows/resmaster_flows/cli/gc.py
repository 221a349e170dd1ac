"""`resmaster gc`: removes a dataset's leftovers, and prints how much it removed. Needs no Prefect, loads no model."""

from __future__ import annotations

import argparse
import math
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import UserError

DESCRIPTION = (
    "Remove what interrupted and losing attempts left behind, probes, temporary files and caches of finished shards, "
    "if they are older than a grace period. Never removed are records, error ledgers, and what a commit or the plan "
    "names."
)
GRACE_HOURS = 24.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument(
        "--older-than",
        metavar="HOURS",
        type=float,
        default=GRACE_HOURS,
        help=f"leave younger files alone (default: {GRACE_HOURS:g}); a build that runs may need what is younger than "
        "its longest upload",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace, console: Console) -> int:
    """Find the leftovers, remove them unless `--dry-run` is given, and print a table."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.leftovers import find_leftovers, remove_leftovers, unlisted_uploads

    if not (math.isfinite(args.older_than) and 0 <= args.older_than < 1e6):
        raise UserError(f"--older-than {args.older_than:g}: give a number of hours, 0 or more")
    dataset = open_dataset(args.root)
    grace = timedelta(hours=args.older_than)
    found = find_leftovers(dataset, grace)
    if not args.dry_run:
        remove_leftovers(dataset.folder, found)
    out = SafeConsole()
    if found:
        table = Table("what", "files", "bytes", box=None, pad_edge=False)
        for kind in dict.fromkeys(leftover.kind for leftover in found):
            files = [leftover.file for leftover in found if leftover.kind == kind]
            table.add_row(kind, f"{len(files):,}", f"{sum(file.bytes for file in files):,}")
        out.print(table)
        if args.dry_run:
            for leftover in found:
                say(out, leftover.file.name)
    if reason := unlisted_uploads(dataset.folder):
        say(out, f"unfinished uploads are left: {reason} (end them by a lifecycle rule of the bucket)")
    verb = "would be removed" if args.dry_run else "removed"
    say(out, f"{dataset.url}: {len(found):,} leftovers {verb}")
    return 0
