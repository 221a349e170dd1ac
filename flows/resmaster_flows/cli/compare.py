"""`resmaster compare`: build the same samples by several methods, and measure them."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.arguments import add_source, config_of
from resmaster_flows.cli.execute import execute, look_around
from resmaster_flows.watch.progress import plans
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.method import methods
from resmaster_stages.progress import listening
from resmaster_stages.redaction import printable

if TYPE_CHECKING:
    from resmaster_stages.evaluation.compare import Compared

DESCRIPTION = (
    "Build one dataset per method and scale, with the same prompts, seeds and low-res images, and measure them "
    "together. Safe to stop and to run again: each of them is a dataset."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_source(parser)
    parser.add_argument("--n", dest="limit", metavar="N", type=int, help="the same as --limit")
    parser.add_argument(
        "--methods",
        required=True,
        metavar="LIST",
        help=f"comma-separated, of: {', '.join(methods())}; with a method's parts and settings: resmaster+sg+tip "
        "(these parts only), resmaster-etp (without it), resmaster:stride=0.75:structure.preset=paper, "
        "demofusion:cosine_scale_1=3",
    )
    parser.add_argument(
        "--scales",
        default="4x4",
        metavar="LIST",
        help="height x width in native sizes, e.g. 2x2,2x4,4x4 (default: 4x4)",
    )
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="real images for FID and KID: a folder, WebDataset .tar shards, or picturebook: its prompts drawn by "
        "vectors at the target size (default: the low-res images)",
    )
    parser.add_argument(
        "--low-res",
        choices=("generated", "drawn"),
        default="generated",
        help="drawn: picturebook's prompts drawn by vectors at the low-res size, so the true enlargement is known and "
        "the distance from it is measured (default: generated)",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Build each dataset under the live display, and measure. Returns 0 if every shard is finished, else 1."""
    from resmaster_stages.evaluation.compare import compare

    def build(config: DatasetConfig) -> bool:
        def flow() -> Any:
            from resmaster_flows.build import build_dataset
            from resmaster_flows.calls import call

            return call(build_dataset, config, read_input=False)

        return execute(console, flow) == 0

    config = config_of(args)
    around = look_around(config)
    with listening(plans(partial(say, console))):
        found = compare(
            config, args.methods, args.scales, build, around=around, reference=args.reference, low_res=args.low_res
        )
    print_tables(found.measured)
    print(f"comparison: {printable(found.page)}")
    return 0 if found.finished else 1


def print_tables(found: Compared) -> None:
    """Print one table per scale on standard output: a line per metric and a column per method, to fit terminals."""
    from resmaster_stages.evaluation.page import cell, shown

    out = SafeConsole()
    for scale in found.keys:
        rows = [row for row in found.rows if row["scale"] == scale]
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{scale}, n = {rows[0]['samples']}", no_wrap=True)
        for row in rows:
            table.add_column(row["method"], justify="right", overflow="fold")
        for column in shown(rows):
            table.add_row(column.heading, *(cell(row, column) for row in rows))
        out.print(table)
        out.print()
