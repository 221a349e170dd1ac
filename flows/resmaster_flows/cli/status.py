"""`resmaster status`: prints what is committed, pending and failed, in a dataset or in all datasets of a root."""

from __future__ import annotations

import argparse
import json
import math
import signal
import threading
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.stop import NOTHING_WRITTEN, Terminated, exit_status, leave
from resmaster_flows.selection import spell_shards
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import UserError
from resmaster_stages.redaction import printable, quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.overview import Overview
    from resmaster_stages.inspection.status import StageError, Status
    from resmaster_stages.storage.filesystem import Folder

MESSAGE_CHARACTERS = 200
"""Longer messages are cut here; `explain` prints them whole."""
SHARDS_CHARACTERS = 60
"""Longer lists of shards are cut here."""

LISTS = ("failed", "flagged", "duplicates", "rejected", "kept", "inputs")
"""The lists of `resmaster_stages.inspection.lists`, which is not imported for the help."""

PORTS = range(1, 65536)
HOST, PORT = "127.0.0.1", 9843
EVERY_SECONDS = 60.0
TABLE_WIDTH = 1000
"""Columns that a table over many datasets may have, whatever the terminal has."""

HELP = "what is committed, pending, failed; of one dataset or of all datasets of a root"
DESCRIPTION = (
    "Print, per stage, how many shards are committed, pending and failed, how many samples are ok or failed, why "
    "shards failed, and whether what is committed is published. Given a root of several datasets, print a line for "
    "each of those directly below it, the one that needs attention first. Reads the datasets only; needs no Prefect. "
    "Exit status 1 if a commit record or a dataset cannot be read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("root", metavar="ROOT", help="a dataset's folder or URL, or a root that holds datasets")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--list",
        dest="listed",
        choices=LISTS,
        metavar="WHAT",
        help=f"print names instead, one a line, with what is known of each: {', '.join(LISTS)}; of one dataset",
    )
    form.add_argument("--openmetrics", action="store_true", help="print OpenMetrics text, for Prometheus and its kin")
    form.add_argument(
        "--serve",
        nargs="?",
        const=f"{HOST}:{PORT}",
        metavar="[HOST:]PORT",
        help=f"serve these metrics over HTTP at /metrics until Ctrl-C (default: {HOST}:{PORT})",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=EVERY_SECONDS,
        metavar="SECONDS",
        help=f"with --serve: how often the datasets are looked at (default: {EVERY_SECONDS:g})",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the status as a table, as JSON or as OpenMetrics, or serve it."""
    from resmaster_stages.dataset.dataset import dataset_in, dataset_or_root, datasets_below, open_dataset
    from resmaster_stages.storage.filesystem import Folder

    if args.serve:
        return _serve(dataset_or_root(args.root), args.serve, args.every)
    place = dataset_or_root(args.root)
    if isinstance(place, Folder):
        below = datasets_below(place)
        if len(below) == 1:
            place = dataset_in(place.sub(below[0]))
        elif args.listed or not below:
            place = open_dataset(args.root)  # which says what to do
    if args.openmetrics:
        from resmaster_stages.inspection.openmetrics import openmetrics

        print(openmetrics(place), end="")
        return 0
    return _overview(place, args.json, console) if isinstance(place, Folder) else _status(place, args, console)


def _status(dataset: Dataset, args: argparse.Namespace, console: Console) -> int:
    """Print the status of one dataset."""
    from resmaster_stages.inspection.status import status

    if args.listed:
        return _print_list(dataset, args.listed)
    found = status(dataset)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(dataset, found)
    for line in found.unreadable:
        say(console, line)
    return 1 if found.unreadable else 0


def _overview(root: Folder, as_json: bool, console: Console) -> int:
    """Print the status of all datasets of a root."""
    from resmaster_stages.inspection.overview import overview

    found = overview(root)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print_overview(found)
    for each in found.others:
        say(console, each.line)
    return 1 if found.unreadable else 0


def _print_overview(found: Overview) -> None:
    from resmaster_stages.inspection.overview import HEADINGS, cells

    out = SafeConsole()
    say(out, f"{found.root}: {found.count}")
    table = Table(*(heading.replace(" ", "\n") for heading in HEADINGS), box=None, pad_edge=False)
    for numbers in found.datasets:
        table.add_row(*cells(numbers, found.seen))
    # a table that is broken within its cells cannot be read
    out.width = max(out.width, out.measure(table, options=out.options.update(width=TABLE_WIDTH)).maximum)
    out.print(table)
    if any(numbers.estimated for numbers in found.datasets):
        say(out, f"~ is an estimate from some of the records; exact: resmaster status {quoted(found.root)}/NAME")


def _serve(place: Dataset | Folder, address: str, every_seconds: float) -> int:
    """Serve metrics until a signal ends the command."""
    from resmaster_stages.inspection.exporter import serving_metrics

    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and int(port) in PORTS):
        raise UserError(f"--serve {address}: give a port from {PORTS[0]} to {PORTS[-1]}, or HOST:PORT")
    if not (math.isfinite(every_seconds) and every_seconds >= 1):
        raise UserError(f"--every {every_seconds:g}: give at least 1 second")
    try:
        with serving_metrics(place, host.strip("[]") or HOST, int(port), every_seconds) as url:
            print(f"metrics: {url}", flush=True)
            threading.Event().wait()
    except (KeyboardInterrupt, Terminated) as stop:  # a thread may wait for a store that does not answer
        status = exit_status(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        leave(status, f"{NOTHING_WRITTEN}\n")
    raise AssertionError("only a signal ends the wait")


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
    if found.spent.seconds:
        say(out, f"cost so far: {found.spent.told()}")
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
    table.add_column("device time")
    if found.spent.price is not None:
        table.add_column("cost")
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.committed),
            str(stage.pending),
            str(stage.failed),
            str(stage.samples_ok),
            str(stage.samples_failed),
            *found.spent.cells(stage.stage),
        )
    return table
