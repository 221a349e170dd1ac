"""What `resmaster plan --estimate` prints."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmaster_flows.cli.execute import config_of
from resmaster_flows.watch.pace import spell_seconds
from resmaster_stages.errors import UserError
from resmaster_stages.planning.estimate import Estimate
from resmaster_stages.publish.card import spell_bytes


def print_estimate(found: Estimate, out: Console) -> None:
    """A table by stage, the totals, and where each number comes from."""
    table = Table(
        "stage", "shards", "samples", "per sample", "device time", "written", "writes", box=None, pad_edge=False
    )
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.shards),
            str(stage.samples),
            "?" if stage.seconds_per_sample is None else f"{stage.seconds_per_sample:.3g} s",
            "?" if stage.seconds is None else spell_seconds(stage.seconds),
            spell_bytes(stage.bytes),
            str(stage.requests),
        )
    out.print(table)
    without = f", without {', '.join(found.unknown)}" if found.unknown else ""
    money = "" if found.cost is None else f", {found.cost:,.2f} at {found.price:g} an hour"
    out.print(f"device time: {found.device_hours:.2f} h{money}{without}", highlight=False, soft_wrap=True)
    workers = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
    out.print(f"wall time: {spell_seconds(found.wall_seconds)} on {workers}{without}", highlight=False, soft_wrap=True)
    out.print(f"written: {spell_bytes(found.bytes)} in {found.requests:,} writes", highlight=False, soft_wrap=True)
    out.print("Not counted: loading of models, start of workers, retries, reads.", highlight=False, soft_wrap=True)
    sources: dict[str, list[str]] = {}
    for stage in found.stages:
        sources.setdefault(f"time: {stage.seconds_source}", []).append(stage.stage)
        sources.setdefault(f"bytes: {stage.bytes_source}", []).append(stage.stage)
    for source, stages in sources.items():
        out.print(f"{', '.join(stages)}: {source}", highlight=False, soft_wrap=True, markup=False)


def plan(args: argparse.Namespace, console: Console) -> int:
    """`resmaster plan`"""
    from resmaster_stages.planning.preview import preview

    look = preview(config_of(args))
    out = Console()
    out.print(escape(look.headline()), highlight=False, soft_wrap=True)
    table = Table("stage", "shards to do", "shards committed", "samples to do", box=None, pad_edge=False)
    for stage in look.stages:
        table.add_row(stage.stage, str(stage.shards_pending), str(stage.shards_committed), str(stage.samples_pending))
    out.print(table)
    for rejected in look.rejected[:10]:
        out.print(f"rejected: {rejected}", highlight=False, soft_wrap=True, markup=False)
    if len(look.rejected) > 10:
        out.print(f"... and {len(look.rejected) - 10} more rejected")
    if args.estimate:
        from resmaster_stages.planning.estimate import estimate

        print_estimate(estimate(look, workers=args.workers, price=args.price), out)
    elif args.workers != 1 or args.price is not None:
        raise UserError("--workers and --price are of --estimate; add --estimate")
    return 0
