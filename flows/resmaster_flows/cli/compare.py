"""`resmaster compare`: build the same samples by several methods, and measure them."""

from __future__ import annotations

import argparse

from rich.console import Console

from resmaster_flows.cli.execute import config_of, execute, no_bars


def compare(args: argparse.Namespace, console: Console) -> int:
    """`resmaster compare`"""
    from resmaster_flows.compare import compare as compare_methods
    from resmaster_stages.planning.preview import Preview

    def build(look: Preview) -> int:
        config = look.config
        return execute(console, config, look.pending_samples(), look.shards, "build_dataset", {"config": config})

    config = config_of(args)
    no_bars(config)
    return compare_methods(config, args, build, console)
