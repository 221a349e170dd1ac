"""`resmaster status`: prints what is committed, pending and failed."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.selection import spell_shards
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.redaction import printable, quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.status import StageError, Status

MESSAGE_CHARACTERS = 200
"""Longer messages are cut here; `explain` prints them whole."""
SHARDS_CHARACTERS = 60
"""Longer lists of shards are cut here."""

LISTS = ("failed", "flagged", "duplicates", "rejected", "kept", "inputs")
"""The lists of `resmaster_stages.inspection.lists`, which is not imported for the help."""

DESCRIPTION = (
    "Print, per stage, how many shards are committed, pending and failed, how many samples are ok or failed, why "
    "shards failed, and whether what is committed is published. Reads the dataset only; needs no Prefect. Exit status "
    "1 if a commit record cannot be read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--list",
        dest="listed",
        choices=LISTS,
        metavar="WHAT",
        help=f"print names instead, one a line, with what is known of each: {', '.join(LISTS)}",
    )
    form.add_argument("--openmetrics", action="store_true", help="print OpenMetrics text, for Prometheus and its kin")


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the status as a table, as JSON or as OpenMetrics."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.status import status

    dataset = open_dataset(args.root)
    if args.listed:
        return _print_list(dataset, args.listed)
    if args.openmetrics:
        from resmaster_stages.inspection.openmetrics import openmetrics

        print(openmetrics(dataset), end="")
        return 0
    found = status(dataset)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(dataset, found)
    for line in found.unreadable:
        say(console, line)
    return 1 if found.unreadable else 0


def _print_list(dataset: Dataset, name: str) -> int:
    """Print a list: the columns of a line are separated by tabs, and the first is the key or the input."""
    from resmaster_stages.inspection.lists import listed

    for item in listed(dataset, name):
        values = (", ".join(value) if isinstance(value, list) else value for value in item.values())
        print("\t".join("" if value is None else printable(" ".join(str(value).split())) for value in values))
    return 0


def _print(dataset: Dataset, found: Status) -> None:
    out = SafeConsole()
    say(out, f"{dataset.url}: {found.shards} shards, {found.samples} samples")
    out.print(_table(found))
    for stage in found.stages:
        for error in stage.errors:
            say(out, _error(stage.stage, error))
    if any(stage.errors for stage in found.stages):
        say(out, f"all attempts at a shard: resmaster explain {quoted(dataset.url)} SHARD")
    for stage in found.stages:
        if stage.damaged_shards:
            shards = ", ".join(map(str, stage.damaged_shards))
            say(
                out, f"damaged: {stage.stage} of shards {shards}; put them back: resmaster repair {quoted(dataset.url)}"
            )
    redo = [f"{stage.stage} of {stage.redo_samples} samples" for stage in found.stages if stage.redo_samples]
    if redo:
        say(out, f"to make again: {', '.join(redo)}; go on: resmaster repair {quoted(dataset.url)}")
    if publication := found.publication_line(dataset.url):
        say(out, publication)
    added = f", prompts in {found.generations} generations" if found.generations > 1 else ""
    say(out, f"configuration: {found.config}{added}")
    for stage in found.stages:
        for namespace, count in stage.others.items():
            say(out, f"kept of another one: {stage.stage}-{namespace}, {count} shards")


def _error(stage: str, error: StageError) -> str:
    """The failed shards of a stage with errors of one class, in one line."""
    last = error.last
    reason = f"{error.error_class}: {last.message}" if last.message else error.error_class
    if len(reason) > MESSAGE_CHARACTERS:
        reason = f"{reason[:MESSAGE_CHARACTERS]}..."
    spelled = spell_shards(error.shards)
    if len(spelled) > SHARDS_CHARACTERS:
        spelled = f"{spelled[:SHARDS_CHARACTERS].rpartition(',')[0]},..."
    count = f"{len(error.shards)} shards ({spelled})"
    run = f"in run {last.flow_run_name} " if last.flow_run_name else ""
    return f"failed: {stage} of {count}: {reason} (last {last.failed_at} {run}on {last.host})"


def _table(found: Status) -> Table:
    table = Table("stage", "committed", "pending", "failed", "samples ok", "samples failed", box=None, pad_edge=False)
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.committed),
            str(stage.pending),
            str(stage.failed),
            str(stage.samples_ok),
            str(stage.samples_failed),
        )
    return table
