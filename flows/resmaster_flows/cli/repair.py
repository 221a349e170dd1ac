"""`resmaster repair`: do only what is missing, failed or damaged."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from resmaster_flows.cli.execute import execute
from resmaster_flows.selection import parse_numbers, parse_stages


def repair(args: argparse.Namespace, console: Console) -> int:
    """`resmaster repair`"""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.status import pending, pending_samples

    shards, stages = parse_numbers(args.shards), parse_stages(args.stages)
    dataset = open_dataset(args.root)
    if args.retry_errors:
        from resmaster_stages.dataset.retry import request_retries

        asked = request_retries(dataset, shards=shards, stages=stages)
        console.print(f"{escape(dataset.url)}: {asked} failed samples to try again", highlight=False, soft_wrap=True)
    todo = pending(dataset, shards=shards, stages=stages)
    count = len({shard for missing in todo.values() for shard in missing})
    if not count:
        console.print(f"{escape(dataset.url)}: nothing to repair", highlight=False, soft_wrap=True)
        return 0
    return execute(
        console,
        dataset.config,
        pending_samples(dataset, todo),
        count,
        "repair",
        {"dataset_url": dataset.url, "shards": args.shards, "stages": stages, "replace": args.replace},
    )
