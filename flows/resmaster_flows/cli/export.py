"""`resmaster export`: writes chosen samples in the formats of other tools. Needs no Prefect and loads no model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress as Bar

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.watch.terminal import say
from resmaster_stages.errors import UserError
from resmaster_stages.publish.exports import FORMATS

if TYPE_CHECKING:
    from resmaster_stages.publish.exports.export import Progress

DESCRIPTION = (
    "Write samples of a published dataset to a folder, in a format that other tools read. Rejected samples are left "
    "out. Run the command again to complete an export that was broken off, or to bring it up to date. Needs no "
    "Prefect. Exit status 1 if no sample is chosen."
)
FULL = "full"
SMALLEST_PX, LARGEST_PX = 16, 65_536
"""Sizes that `--sizes` takes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder or s3:// URL, or an export to complete")
    readers = "; ".join(f"{each.name}: {each.readers}" for each in FORMATS)
    parser.add_argument(
        "--as",
        dest="format",
        metavar="FORMAT",
        choices=[each.name for each in FORMATS],
        required=True,
        help=f"the format, and who reads it: {readers}".replace("%", "%%"),
    )
    parser.add_argument(
        "--where", metavar="EXPR", default="", help='only samples for which this holds, as "agreement_psnr > 22"'
    )
    parser.add_argument("--with-rejected", action="store_true", help="also the samples that somebody rejected")
    parser.add_argument(
        "--sizes",
        metavar="LIST",
        help=f"copies with at most so many px in the square, each size in a folder of its own, as {FULL},1024,2048; "
        f"{FULL} is the image as it is",
    )
    parser.add_argument(
        "--sign-with",
        nargs=2,
        metavar=("CERT", "KEY"),
        help="sign the images with content credentials (C2PA): PEM files of the certificates and of the key; needs the "
        "extra c2pa",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N of these samples")


def run(args: argparse.Namespace, console: Console) -> int:
    """Export, and print what is there. Returns 1 if no sample is chosen, else 0."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: give a number of at least 1")
    sizes = parse_sizes(args.sizes)
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.publish.exports.export import export
    from resmaster_stages.publish.exports.record import Options

    dataset = open_dataset(args.root)
    signer = None
    if args.sign_with:
        from resmaster_stages.publish.exports.signing import signer_of

        signer = signer_of(*args.sign_with)
    fingerprint = signer.fingerprint if signer else ""
    options = Options(args.format, args.where, args.with_rejected, sizes, args.limit, fingerprint)
    with _progress(console) as progress:
        done = export(dataset, args.folder, options, progress, signer)
    if not done.samples:
        say(console, f"{dataset.url}: no sample is chosen; nothing is written")
        return 1
    for note in done.notes:
        say(console, note)
    removed = f", {done.removed:,} files removed" if done.removed else ""
    say(console, f"{done.samples:,} samples in {args.folder}, {done.written:,} of them written now{removed}")
    return 0


def parse_sizes(text: str | None) -> tuple[int | None, ...]:
    """`--sizes` as sizes in px, without repetitions; None stands for the image as it is. Raises UserError."""
    sizes: list[int | None] = []
    for word in text.split(",") if text is not None else ():
        word = word.strip()
        if word != FULL and not (word.isascii() and word.isdigit() and SMALLEST_PX <= int(word[:9]) <= LARGEST_PX):
            raise UserError(
                f"--sizes {text}: {word!r} is no size; give numbers from {SMALLEST_PX} to {LARGEST_PX} and {FULL}, "
                "separated by commas"
            )
        sizes.append(None if word == FULL else int(word))
    return tuple(dict.fromkeys(sizes))


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Within the block, show how many samples are done: by a bar on a terminal, else by a line per tenth."""
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("exporting", total=None)
        tenths = 0

        def progress(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and done * 10 // total > tenths:
                tenths = done * 10 // total
                say(console, f"  {done:,} of {total:,} samples")

        yield progress
