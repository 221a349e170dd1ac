"""`resmaster gc`: remove a dataset's leftovers, and say how much that was. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import math
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.leftovers import find_leftovers, remove_leftovers

GRACE_HOURS = 24.0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    sub.add_argument("root", metavar="ROOT", help="the dataset's folder or URL (or a root that holds just one)")
    sub.add_argument(
        "--older-than",
        metavar="HOURS",
        type=float,
        default=GRACE_HOURS,
        help=f"leave younger files alone (default: {GRACE_HOURS:g}); a build that runs may need what is younger than its longest "
        "upload",
    )
    sub.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def gc(args: argparse.Namespace, console: Console) -> int:
    """Find leftovers, remove them, print a table."""
    if not (math.isfinite(args.older_than) and 0 <= args.older_than < 1e6):
        raise UserError(f"--older-than {args.older_than:g}: give a number of hours, 0 or more")
    dataset = open_dataset(args.root)
    grace = timedelta(hours=args.older_than)
    found = find_leftovers(dataset.folder, stage_hashes(dataset.config), grace)
    if not args.dry_run:
        remove_leftovers(dataset.folder, found)
    out = Console()
    if found:
        table = Table("what", "files", "bytes", box=None, pad_edge=False)
        for kind in dict.fromkeys(leftover.kind for leftover in found):
            files = [leftover.file for leftover in found if leftover.kind == kind]
            table.add_row(kind, f"{len(files):,}", f"{sum(file.bytes for file in files):,}")
        out.print(table)
        if args.dry_run:
            for leftover in found:
                out.print(escape(leftover.file.name), highlight=False, soft_wrap=True)
    verb = "would be removed" if args.dry_run else "removed"
    out.print(f"{escape(dataset.url)}: {len(found):,} leftovers {verb}", highlight=False, soft_wrap=True)
    return 0
