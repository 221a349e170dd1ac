"""Runs a flow from the command line: under the live display, with a Prefect server within reach."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.errors import UserError

if TYPE_CHECKING:
    from resmaster_flows.build import BuildResult


def config_of(args: argparse.Namespace) -> DatasetConfig:
    """CONFIG with the command line's overrides; relative paths given on the command line become absolute."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: give a number of at least 1")
    if args.prompts and args.images:
        raise UserError(
            "--prompts and --images exclude each other: give one; prompts for your images go beside them as .txt"
        )

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).resolve())

    return load_config(
        args.config,
        root=args.root,
        prompts=absolute(args.prompts),
        images=absolute(args.images),
        limit=args.limit,
        allow_overwriting_store=args.allow_overwriting_store or None,
    )


def _finished(console: Console, result: BuildResult) -> int:
    for shard, error in result.errors.items():
        console.print(
            f"[red]shard {int(shard):06d} not finished:[/red] {escape(error)}", highlight=False, soft_wrap=True
        )
    failed = f", {result.samples_failed} failed (see errors/)" if result.samples_failed else ""
    console.print(f"{result.samples} samples{failed} in {escape(result.dataset_url)}", highlight=False, soft_wrap=True)
    if result.errors:
        console.print(
            f"{len(result.errors)} shards are missing; try again with: resmaster repair {escape(result.dataset_url)}"
        )
    print(f"report: {result.report_url}")
    return 1 if result.errors else 0


def no_bars(config: DatasetConfig) -> None:
    """No download bars where there is nothing to download: loading takes a second."""
    if config.model.id == "picturebook" or Path(config.model.id).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def execute(
    console: Console,
    config: DatasetConfig,
    pending_samples: dict[str, int],
    shard_count: int,
    build: str,
    arguments: dict[str, object],
) -> int:
    """Run a flow of `resmaster_flows.build` under the live display."""
    no_bars(config)
    if config.dispatch.where == "dask" or config.dispatch.where == "ray":
        from resmaster_flows.clusters import check

        check(config.dispatch.where)
    from resmaster_flows.watch.terminal import TerminalReporter
    from resmaster_stages.progress import reporting

    with TerminalReporter(pending_samples, shard_count, console) as reporter, reporting(reporter):
        import resmaster_flows.build
        from resmaster_flows.outcome import outcome
        from resmaster_flows.server_runs import server_within_reach

        with server_within_reach():
            result: BuildResult = outcome(getattr(resmaster_flows.build, build)(**arguments, return_state=True))
    return _finished(console, result)
