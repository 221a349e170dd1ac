"""`resmaster run`: build a dataset, or go on with it."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from resmaster_flows.cli.execute import config_of, execute


def run(args: argparse.Namespace, console: Console) -> int:
    """`resmaster run`"""
    from resmaster_stages.planning.preview import preview

    config = config_of(args)
    if args.executor:
        dispatch = config.dispatch.model_copy(update={"where": args.executor})
        config = config.model_copy(update={"dispatch": dispatch})
    look = preview(config)  # all that can be wrong with the input is found here, before anything starts
    console.print(escape(look.headline()), highlight=False, soft_wrap=True)
    return execute(console, config, look.pending_samples(), look.shards, "build_dataset", {"config": config})
