"""What `resmaster plan --estimate` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flows.display import spell_seconds
from resmaster_stages.estimate import Estimate
from resmaster_stages.publish import spell_bytes


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
