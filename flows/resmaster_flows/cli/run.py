"""`resmaster run`: builds a dataset, or continues it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from rich.console import Console

from resmaster_flows.cli.arguments import add_source, config_of
from resmaster_flows.cli.execute import execute, require_surroundings
from resmaster_flows.watch.progress import plans
from resmaster_flows.watch.terminal import say
from resmaster_stages.progress import listening

HELP = "build a dataset, or go on with it"
DESCRIPTION = (
    "Build the dataset that CONFIG describes. Safe to stop at any moment and to run again: committed shards are "
    "never redone, and the result is the same to the byte. After two kills in one batch its samples are computed alone "
    "and may differ by rounding, and a sample at which three processes were killed is left out as failed; "
    "`repair --retry-errors` tries it again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_source(parser)
    parser.add_argument(
        "--executor",
        choices=("dask", "ray"),
        help="do the shards on a cluster that is there already (DASK_SCHEDULER_ADDRESS or RAY_ADDRESS)",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Plan, then build. Returns 0 if every shard is finished, else 1."""
    from resmaster_stages.planning.drafts import require_source
    from resmaster_stages.prompts import ingest

    config = config_of(args)
    if args.executor:
        dispatch = config.dispatch.model_copy(update={"where": args.executor})
        config = config.model_copy(update={"dispatch": dispatch})
    require_source(config)  # also where a plan exists, as `plan` does
    require_surroundings(config)
    with listening(plans(partial(say, console))):
        config = ingest(config).config  # with an absolute root, by which the server tells datasets apart

    def build() -> Any:
        from resmaster_flows.build import build_dataset
        from resmaster_flows.calls import call

        return call(build_dataset, config, read_input=False)

    return execute(console, config, build)
