"""`resmaster curate`: keeps or rejects samples from the command line, and moves choices to and from files."""

from __future__ import annotations

import argparse
import getpass
from typing import TYPE_CHECKING

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import UserError
from resmaster_stages.redaction import quoted

if TYPE_CHECKING:
    from resmaster_stages.dataset.curation import Choice
    from resmaster_stages.dataset.dataset import Dataset

HELP = "keep or reject samples; import and export choices"
DESCRIPTION = (
    "Choose samples by an expression, or move choices to and from CSV and Parquet files. Without an option, print how "
    "many samples are kept, rejected and rated. Choices are data beside the dataset: no image is changed. `publish` "
    "honours them. The page of `resmaster view` is the place to choose by looking."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    verdicts = parser.add_mutually_exclusive_group()
    for option, what in (("keep", "keep"), ("reject", "reject"), ("forget", "take back all choices about")):
        verdicts.add_argument(
            f"--{option}",
            metavar="EXPRESSION",
            help=f"{what} the published samples for which it holds, e.g. \"agreement_psnr < 20 or 'seam' in flags\"",
        )
    verdicts.add_argument("--import", dest="source", metavar="FILE", help="choices from a .csv or .parquet file")
    verdicts.add_argument("--export", metavar="FILE", help="write the choices that count to a .csv or .parquet file")
    parser.add_argument("--reason", metavar="TEXT", default="", help="why, for --keep and --reject")
    parser.add_argument("--who", metavar="NAME", help="who chooses (default: the user's name on this machine)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Do what the option says, and print how many samples are chosen then."""
    from resmaster_stages.dataset.curation import count, read_choices
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.choice_files import write_choice_file

    dataset = open_dataset(args.root)
    if args.export:
        write_choice_file(args.export, read_choices(dataset.folder).values())
        say(console, f"{args.export}: {len(read_choices(dataset.folder))} choices written")
        return 0
    if new := _new_choices(dataset, args, console):
        from resmaster_stages.dataset.curation import Session

        Session(dataset.folder).add(new)
        say(console, f"{len(new)} choices added; readers get them by: resmaster publish {quoted(dataset.url)}")
    found = count(read_choices(dataset.folder).values())
    say(SafeConsole(), f"{dataset.url}: {found.kept} kept, {found.rejected} rejected, {found.rated} rated")
    return 0


def _new_choices(dataset: Dataset, args: argparse.Namespace, console: Console) -> list[Choice]:
    """The choices that the arguments make; none without an option. Raises UserError for a bad expression or file."""
    from resmaster_stages.dataset.curation import Choice, Verdict, now
    from resmaster_stages.inspection.choice_files import read_choice_file
    from resmaster_stages.inspection.query import Query, sample_table

    who, when = args.who or getpass.getuser(), now()
    if args.source:
        return read_choice_file(args.source, who, when, frozenset(dataset.plan.keys()))
    verdicts: dict[Verdict, str | None] = {"kept": args.keep, "rejected": args.reject, "none": args.forget}
    for verdict, where in verdicts.items():
        if where is None:
            continue
        if not where.strip():
            raise UserError("the expression is empty; write `true` for all samples")
        with sample_table(dataset) as table:
            keys = table.keys(Query(where=where))
        if not keys:
            say(console, f"{where!r} holds for no sample; nothing was chosen")
        return [Choice(key, verdict, None, args.reason, who, when) for key in keys]
    return []
