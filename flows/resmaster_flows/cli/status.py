"""`resmaster status`: what is committed, pending and failed."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from resmaster_stages.dataset.dataset import Dataset
    from resmaster_stages.inspection.status import Status


def _status_table(dataset: Dataset, found: Status) -> Table:
    table = Table("stage", "committed", "pending", "failed", "samples ok", "samples failed", box=None, pad_edge=False)
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.committed),
            str(stage.pending),
            str(stage.failed),
            str(stage.samples_ok),
            str(stage.samples_failed),
        )
    return table


def status(args: argparse.Namespace, console: Console) -> int:
    """`resmaster status`"""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.status import status as read_status

    dataset = open_dataset(args.root)
    if args.openmetrics:
        from resmaster_stages.inspection.openmetrics import openmetrics

        print(openmetrics(dataset), end="")
        return 0
    found = read_status(dataset)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        out = Console()
        out.print(
            f"{escape(dataset.url)}: {found.shards} shards, {found.samples} samples", highlight=False, soft_wrap=True
        )
        out.print(_status_table(dataset, found))
        for stage in found.stages:
            if stage.damaged_shards:
                shards = ", ".join(map(str, stage.damaged_shards))
                out.print(
                    f"damaged: {stage.stage} of shards {shards}; put them back: resmaster repair {escape(dataset.url)}",
                    highlight=False,
                    soft_wrap=True,
                )
        added = f", prompts in {found.generations} generations" if found.generations > 1 else ""
        out.print(f"configuration: {found.config}{added}", highlight=False, soft_wrap=True)
        others = [(stage.stage, *other) for stage in found.stages for other in stage.others.items()]
        for name, namespace, count in others:
            out.print(f"kept of another one: {name}-{namespace}, {count} shards", highlight=False, soft_wrap=True)
    return 0
