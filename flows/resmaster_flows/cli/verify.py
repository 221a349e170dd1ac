"""`resmaster verify`: prints what differs from its commit record. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.inspection.status import status
from resmaster_stages.inspection.verify import note, verify
from resmaster_stages.redaction import quoted

HELP = "read everything back, and say what is damaged"
DESCRIPTION = (
    "Hash every object that the commits, the plan and the publication name, and list what is gone, cut off, changed "
    "or unreadable, by stage and shard. Marks damaged shards for `repair`. Exit status 1 if something is damaged, or "
    "if all is committed and not published."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    """Read every object and mark damaged shards. Returns 0 if everything is as recorded and published, else 1."""
    dataset = open_dataset(args.root)
    found = verify(dataset)
    if args.json:
        print(json.dumps({"dataset": dataset.url, **asdict(found)}, indent=2))
    else:
        out = SafeConsole()
        if found.damage:
            table = Table("stage", "shard", "object", "what", box=None, pad_edge=False)
            for damage in found.damage:
                table.add_row(
                    damage.stage,
                    "" if damage.shard is None else f"{damage.shard:06d}",
                    escape(damage.name),
                    damage.what + ("" if damage.current else " (an older configuration's)"),
                )
            out.print(table)
        size = f"{found.objects:,} objects, {found.bytes / 1e9:,.3f} GB"
        say(out, f"{dataset.url}: {size} read")
    note(dataset, found)
    if not found.damage:
        state = status(dataset)
        publication = state.publication_line(dataset.url)
        say(console, f"every object is as recorded; {publication}" if publication else "everything is as recorded")
        return 1 if publication and state.complete else 0
    if any(damage.stage == "plan" for damage in found.damage):
        say(console, "the plan cannot be made again: restore its folder from a copy")
    say(console, f"{len(found.damage)} objects are damaged; next: resmaster repair {quoted(dataset.url)}")
    return 1
