"""`resmaster plan`: prints what `run` would do, and with `--estimate` what it would cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from resmaster_flows.cli.arguments import add_exclude, add_limits, add_source, config_of, excluded_of
from resmaster_flows.watch.pace import spell_seconds
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import UserError
from resmaster_stages.models.licences import uses_base_model
from resmaster_stages.planning.memory import Memory, memory_of
from resmaster_stages.publish.card import spell_bytes

if TYPE_CHECKING:
    from resmaster_stages.planning.estimate import Estimate

DESCRIPTION = (
    "Read the prompts or images and the dataset at the root, and print per stage what would be done and what is "
    "committed. Says what `run` would refuse. Writes nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_source(parser)
    add_exclude(parser)
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="say how long it would take, what it would cost, how much it would write",
    )
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="with --estimate: workers, one device each")
    add_limits(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Print what each stage has to do, and with `--estimate` what that would cost."""
    from resmaster_flows.cli.execute import look_around
    from resmaster_stages.planning.preview import preview

    config = config_of(args)
    look = preview(config, look_around(config), excluded_of(args))
    out = SafeConsole()
    say(out, look.headline())
    table = Table("stage", "shards to do", "shards committed", "samples to do", box=None, pad_edge=False)
    for stage in look.stages:
        table.add_row(stage.stage, str(stage.shards_pending), str(stage.shards_committed), str(stage.samples_pending))
    out.print(table)
    for one, many, inputs in (("rejected", "rejected", look.rejected), ("duplicate", "duplicates", look.duplicates)):
        for each in inputs.first:
            say(out, f"{one}: {each}")
        if more := inputs.count - len(inputs.first):
            say(out, f"... and {more} more {many}")
    for each in look.unchecked:
        say(out, f"not checked: {each}")
    for each in look.notes:
        say(out, f"note: {each}")
    if args.estimate:
        from resmaster_stages.planning.estimate import estimate

        found = estimate(look, workers=args.workers, price=config.dispatch.price)
        _print_estimate(found, out)
        for line in found.warnings(config.dispatch):
            say(out, f"warning: {line}")
        if uses_base_model(config):
            say(out, f"memory: {_spell_memory(memory_of(config.model))}")
    elif args.workers != 1 or any(each is not None for each in (args.price, args.max_cost, args.max_hours)):
        raise UserError("--workers, --price, --max-cost and --max-hours are of --estimate; add --estimate")
    return 0


def _print_estimate(found: Estimate, out: Console) -> None:
    """Print a table by stage, the totals, and the source of each number."""
    from resmaster_stages.inspection.spending import spell_cost, spell_money

    table = Table("stage", "shards", "samples", "per sample", "device time", "written", box=None, pad_edge=False)
    for stage in found.stages:
        table.add_row(
            stage.stage,
            str(stage.shards),
            str(stage.samples),
            "?" if stage.seconds_per_sample is None else f"{stage.seconds_per_sample:.3g} s",
            "?" if stage.seconds is None else spell_seconds(stage.seconds),
            spell_bytes(stage.bytes),
        )
    out.print(table)
    without = f", without {', '.join(found.unknown)}" if found.unknown else ""
    money = "" if found.cost is None else f", {spell_money(found.cost)} at {found.price:g} an hour"
    say(out, f"device time: {found.device_hours:.2f} h{money}{without}")
    if found.spent_seconds:
        say(out, f"spent so far: {spell_cost(found.spent_seconds, found.price)}")
    workers = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
    say(out, f"wall time: {spell_seconds(found.wall_seconds)} on {workers}{without}")
    say(out, f"written: {spell_bytes(found.bytes)}")
    say(out, "Not counted: loading of models, start of workers, retries, reads.")
    sources: dict[str, list[str]] = {}
    for stage in found.stages:
        sources.setdefault(f"time: {stage.seconds_source}", []).append(stage.stage)
        sources.setdefault(f"bytes: {stage.bytes_source}", []).append(stage.stage)
    for source, stages in sources.items():
        say(out, f"{', '.join(stages)}: {source}")


def _spell_memory(memory: Memory | None) -> str:
    """The memory of a base model's weights in one line."""
    if memory is None:
        return "not known, because the base model's weights are not on this machine"
    once, drawing = spell_bytes(memory.encoding), spell_bytes(memory.drawing)
    sizes = once if memory.encoding == memory.drawing else f"{once} while texts are encoded, {drawing} afterwards"
    parts = ", ".join(f"{part} {spell_bytes(size)}" for part, size in memory.parts.items())
    return (
        f"the base model's weights take {sizes} on a GPU, and views take more (model.offload: {memory.offload}; "
        f"{memory.number_format}: {parts})"
    )
