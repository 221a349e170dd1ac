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
    verdicts.add_argument(
        "--import",
        dest="source",
        metavar="FILE",
        help="choices from a .csv or .parquet file, or from samples.json of FiftyOne",
    )
    verdicts.add_argument("--export", metavar="FILE", help="write the choices that count to a .csv or .parquet file")
    parser.add_argument("--reason", metavar="TEXT", default="", help="why, for --keep and --reject")
    parser.add_argument("--who", metavar="NAME", help="who chooses (default: the user's name on this machine)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Do what the option says, and print how many samples are chosen then."""
    from resmaster_stages.dataset.curation import count
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.choice_files import write_choice_file
    from resmaster_stages.inspection.lists import counting_choices

    dataset = open_dataset(args.root)
    if args.export:
        choices = counting_choices(dataset)
        write_choice_file(args.export, choices.values())
        say(console, f"{args.export}: {len(choices)} choices written")
        return 0
    if new := _new_choices(dataset, args, console):
        from resmaster_stages.dataset.curation import Session

        Session(dataset.folder).add(new)
        say(console, f"{len(new)} choices added; readers get them by: resmaster publish {quoted(dataset.url)}")
    found = count(counting_choices(dataset).values())
    say(SafeConsole(), f"{dataset.url}: {found.kept} kept, {found.rejected} rejected, {found.rated} rated")
    return 0


def _new_choices(dataset: Dataset, args: argparse.Namespace, console: Console) -> list[Choice]:
    """The choices that the arguments make; none without an option. Raises UserError for a bad expression or file."""
    from resmaster_stages.dataset.curation import Choice, Verdict, now
    from resmaster_stages.inspection.query import Query, sample_table

    who, when = args.who or getpass.getuser(), now()
    if args.source:
        return _of_file(dataset, args.source, who, when)
    verdicts: dict[Verdict, str | None] = {"kept": args.keep, "rejected": args.reject, "none": args.forget}
    for verdict, where in verdicts.items():
        if where is None:
            continue
        if not where.strip():
            raise UserError("the expression is empty; write `true` for all samples")
        with sample_table(dataset) as table:
            rows = table.rows(Query(where=where), ("key", "take"))
        if not rows:
            say(console, f"{where!r} holds for no sample; nothing was chosen")
        return [Choice(row["key"], verdict, None, args.reason, who, when, row["take"] or 0) for row in rows]
    return []


def _of_file(dataset: Dataset, file: str, who: str, when: str) -> list[Choice]:
    """The choices in a file. Raises UserError, for a key that is not planned too."""
    from resmaster_stages.inspection.choice_files import read_choice_file, read_file, require_known
    from resmaster_stages.publish.exports.fiftyone import choices_in

    takes = _takes(dataset)
    if file.lower().endswith(".json"):
        return require_known(file, choices_in(read_file(file), file, who, when), takes)
    return require_known(file, read_choice_file(file, who, when, takes), takes)


def _takes(dataset: Dataset) -> dict[str, int]:
    """Key of each planned sample -> its published take."""
    from resmaster_stages.dataset import layout
    from resmaster_stages.inspection.query import sample_table

    takes = dict.fromkeys(dataset.plan.keys(), 0)
    if dataset.folder.exists(layout.MANIFEST):
        with sample_table(dataset) as table:
            takes |= {row["key"]: row["take"] or 0 for row in table.rows(columns=("key", "take"))}
    return takes
