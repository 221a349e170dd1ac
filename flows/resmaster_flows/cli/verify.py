"""`resmaster verify`: prints what differs from its commit record. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.redaction import quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.verify import Damage, Verification

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
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.verify import note, verify

    dataset = open_dataset(args.root)
    found = verify(dataset)
    if args.json:
        print(json.dumps({"dataset": dataset.url, **asdict(found)}, indent=2))
    else:
        out = SafeConsole()
        for damage in found.damage:
            say(out, _line(damage))
        size = f"{found.objects:,} objects, {found.bytes / 1e9:,.3f} GB"
        say(out, f"{dataset.url}: {size} read")
    note(dataset, found)
    whole, last = _judged(dataset, found)
    say(console, last)
    return 0 if whole else 1


def _line(damage: Damage) -> str:
    """One damaged object in one line: stage, shard, name, what is wrong, and what to do."""
    shard = "" if damage.shard is None else f" of shard {damage.shard:06d}"
    return f"{damage.stage}{shard}: {damage.name}: {damage.what}; {damage.mend}"


def _judged(dataset: Dataset, found: Verification) -> tuple[bool, str]:
    """Whether all is well, and the last line, which says so or what is next."""
    from resmaster_stages.inspection.status import status
    from resmaster_stages.inspection.verify import BY_HAND, CONFIG_GONE, EXCLUSION_GONE, PLAN_GONE, REQUEST_GONE

    if found.damage:
        by_hand = {
            PLAN_GONE: "the plan cannot be made again: restore its folder from a copy; ",
            CONFIG_GONE: "first see to the configuration; ",
            REQUEST_GONE: "first see to the requests; ",
            EXCLUSION_GONE: "first see to the requests; ",
        }
        verb, first = (
            "repair",
            "".join(said for mend, said in by_hand.items() if any(each.mend == mend for each in found.damage)),
        )
        if all(each.mend in BY_HAND for each in found.damage):
            verb, first = "verify", "repair cannot mend them: do what the lines above say; "
        return False, f"{len(found.damage)} objects are damaged; {first}next: resmaster {verb} {quoted(dataset.url)}"
    state = status(dataset)
    if publication := state.publication_line(dataset.url):
        return not state.complete, f"every object is as recorded; {publication}"
    return True, "everything is as recorded"
