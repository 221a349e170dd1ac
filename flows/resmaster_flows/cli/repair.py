"""`resmaster repair`: processes only what is missing, failed or damaged."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.cli.execute import execute, require_surroundings
from resmaster_flows.cli.publish import judged, publish_now
from resmaster_flows.selection import parse_numbers, parse_stages
from resmaster_flows.watch.terminal import say
from resmaster_flows.workplace import computed_here
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import UserError

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset

DESCRIPTION = (
    "Do what is missing: shards that failed, were interrupted or lost their record, and samples that were asked for "
    "again. Put back what `verify` found damaged, with the same bytes. Then publish. If only the publication is "
    "missing, damaged or made from other commits, nothing else is done. Committed shards that are whole are left alone."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument("--shards", metavar="LIST", help="only these shards, e.g. 1,4-7")
    parser.add_argument("--stages", metavar="LIST", help=f"only these stages, of: {','.join(STAGES)}")
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="give the failed samples of committed shards another attempt; the shard is then replaced by a new one, "
        "in which the others are the same to the byte",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="make damaged shards anew, and all that was made from them, where the same bytes cannot be made any more",
    )
    parser.add_argument(
        "--redo",
        metavar="KEYS",
        help="make these samples again with a new seed, and no others: keys or their beginnings with commas between "
        "them, a .txt file of keys, or a .csv or .parquet file with a column `key` (of choices: the rejected ones)",
    )
    parser.add_argument(
        "--from",
        dest="redo_from",
        metavar="STAGE",
        help="with --redo: the first stage that makes them again; high_res keeps the low-res images and captions",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Find out what is to be done, and do it. Returns 0 if neither shards nor too many samples are missing, else 1."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.dataset.lost_plan import restore_plan
    from resmaster_stages.dataset.retry import retries_of
    from resmaster_stages.inspection.status import pending
    from resmaster_stages.planning.checks import check_stages

    _require_whole_redo(args)
    stages, dataset = parse_stages(args.stages), open_dataset(args.root)
    restored = restore_plan(dataset.folder)
    for name in restored:
        say(console, f"{dataset.url}: {name} is put together again from the plan's files")
    if args.redo is not None:
        dataset = _asked_again(args, console, dataset)
    shards = None if args.shards is None else parse_numbers(args.shards, dataset.plan.shards)
    retries = None
    if args.retry_errors:
        retries, samples = retries_of(dataset, shards, stages)
        say(console, f"{dataset.url}: {samples} failed samples to try again")
    todo = pending(dataset, shards=shards, stages=stages, retries=retries)
    if not any(todo.values()):
        return _publish_if_needed(console, dataset, "nothing else to repair" if restored else "nothing to repair")

    def build() -> Any:
        from resmaster_flows.build import repair
        from resmaster_flows.calls import call

        return call(repair, dataset.url, args.shards, stages, args.retry_errors, args.replace)

    require_surroundings(dataset.config)
    lacking = [stage for stage, numbers in todo.items() if numbers]
    check_stages(dataset.config, lacking, here=computed_here(dataset.config.dispatch))
    return execute(console, build)


def _require_whole_redo(args: argparse.Namespace) -> None:
    if args.redo_from is not None and args.redo is None:
        raise UserError("--from is of --redo; add --redo KEYS, or leave it out")
    for option in ("shards", "stages"):
        if args.redo is not None and getattr(args, option) is not None:
            raise UserError(
                f"--redo and --{option} exclude each other: the keys tell the shards, and all that is made from a "
                "sample is made again; --from says where this begins"
            )


def _asked_again(args: argparse.Namespace, console: Console, dataset: Dataset) -> Dataset:
    """Ask for the samples of `--redo`, if all is there that making them needs. Returns the dataset, unread."""
    from resmaster_stages.planning.checks import check_stages
    from resmaster_stages.planning.redoing import asked, wish

    wanted, stages = wish(dataset, args.redo, args.redo_from), list(dataset.hashes)
    require_surroundings(dataset.config)
    lacking = stages[stages.index(wanted.stage) :]
    check_stages(dataset.config, lacking, here=computed_here(dataset.config.dispatch))
    say(console, asked(dataset, args.redo, args.redo_from))
    return replace(dataset)


def _publish_if_needed(console: Console, dataset: Dataset, otherwise: str) -> int:
    """Publish if the publication is not as it should be, and say `otherwise` if it is.

    Returns 1 if a commit record cannot be read or too many samples failed, else 0.
    """
    from resmaster_stages.inspection.published import Published, changed_files
    from resmaster_stages.inspection.status import status

    found = status(dataset)
    for line in found.unreadable:
        say(console, line)
    if found.unreadable:
        return 1
    published = found.published
    if not published.problem and (changed := changed_files(dataset.folder)):
        published = Published("damaged", changed)
    if published.problem:
        say(console, f"{dataset.url}: its publication {published.spelled()}; nothing else to repair")
        publish_now(console, dataset)
    else:
        say(console, f"{dataset.url}: {otherwise}")
    return judged(console, dataset, found)
