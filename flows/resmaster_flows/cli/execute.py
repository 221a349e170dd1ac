"""Runs a flow from the command line, with the live display and a Prefect server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from resmaster_flows.watch.progress import Progress
from resmaster_flows.watch.terminal import say, terminal
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.errors import ResMasterError
from resmaster_stages.models.places import at_hub

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from resmaster_flows.build import BuildResult


def execute(console: Console, config: DatasetConfig, build: Callable[[], State[Any]]) -> int:
    """Run a flow that builds a dataset, and print its result. Returns the exit status.

    build: calls the flow and returns its final state. It also imports the flow, because importing Prefect takes
    seconds.
    """
    with terminal(Progress(), console):
        from prefect.exceptions import Pause

        from resmaster_flows.outcome import outcome
        from resmaster_flows.server_runs import server_within_reach

        with server_within_reach():
            try:
                result: BuildResult = outcome(build())
            except Pause:
                raise ResMasterError(
                    "suspended on the Prefect server, which cannot resume a run that was started by hand; what is done "
                    "is kept: run the same command again to go on"
                ) from None
    return _finished(console, result)


def require_surroundings(config: DatasetConfig) -> None:
    """Check what a build needs beside its input: the server, and the cluster if one is configured. Raises UserError."""
    from resmaster_flows.server_runs import require_answer

    if config.dispatch.where == "dask" or config.dispatch.where == "ray":
        from resmaster_flows.clusters import check

        check(config.dispatch.where)
    require_answer()
    if not at_hub(config.model.id):
        hide_bars()  # such a model downloads nothing and loads in a second


def hide_bars() -> None:
    """Switch off the progress bars of the libraries that load models. Must be called before these are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _finished(console: Console, result: BuildResult) -> int:
    for shard, error in result.errors.items():
        say(console, Text.assemble((f"shard {int(shard):06d} not finished:", "red"), f" {error}"))
    failed = f", {result.samples_failed} failed (see errors/)" if result.samples_failed else ""
    say(console, f"{result.samples} samples{failed} in {result.dataset_url}")
    if result.errors:
        say(console, f"{len(result.errors)} shards are missing; try again with: resmaster repair {result.dataset_url}")
    print(f"report: {result.report_url}")
    return 1 if result.errors else 0
