"""`resmaster doctor`: examines a store and prints what it can do. Needs no dataset and no Prefect."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.probe import examine

DESCRIPTION = (
    "Try at ROOT what builds need of a store: a name is created only once, also when writers race; an object can be "
    "read, listed and deleted at once. Leaves nothing behind. Exit status 1 if something failed."
)
COLOURS = {"ok": "green", "failed": "red", "untested": "dim", "lacking": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("root", metavar="ROOT", help="folder or s3://bucket/prefix; it need not exist yet")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    """Examine the store. Returns 0 if it can do all that builds need, else 1."""
    folder = open_root(args.root)
    findings = examine(folder)
    good = all(finding.state in ("ok", "lacking") for finding in findings)
    if args.json:
        print(
            json.dumps(
                {"root": folder.url, "ok": good, "findings": [asdict(finding) for finding in findings]}, indent=2
            )
        )
        return 0 if good else 1
    out = SafeConsole()
    table = Table("check", "state", "what was found", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.check, f"[{COLOURS[finding.state]}]{finding.state}[/]", escape(finding.detail))
    out.print(table)
    say(out, f"{folder.url}: {'fit for builds' if good else 'not fit for builds'}")
    return 0 if good else 1
