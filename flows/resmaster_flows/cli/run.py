"""`resmaster run`: builds a dataset, or continues it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from rich.console import Console

from resmaster_flows.cli.arguments import add_exclude, add_source, config_of, excluded_of
from resmaster_flows.cli.execute import execute, look_around
from resmaster_flows.watch.progress import plans
from resmaster_flows.watch.terminal import say
from resmaster_stages.progress import listening

DESCRIPTION = (
    "Build the dataset that CONFIG describes. Safe to stop at any moment and to run again: committed shards are "
    "never redone, and the result is the same to the byte. Only samples at which a process was killed twice may differ "
    "by rounding. After three kills a sample counts as failed, and `repair --retry-errors` tries it again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_source(parser)
    add_exclude(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Plan, then build. Returns 0 if neither shards nor too many samples are missing, else 1."""
    from resmaster_stages.planning.drafts import require_source
    from resmaster_stages.prompts import ingest

    config = config_of(args)
    require_source(config)  # also where a plan exists, as `plan` does
    exclude, around = excluded_of(args), look_around(config)
    with listening(plans(partial(say, console))):
        # with an absolute root, by which the server tells datasets apart
        config = ingest(config, around, exclude).config

    def build() -> Any:
        from resmaster_flows.build import build_dataset
        from resmaster_flows.calls import call

        return call(build_dataset, config, read_input=False)

    return execute(console, build)
