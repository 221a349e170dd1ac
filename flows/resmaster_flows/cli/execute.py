"""Runs a flow from the command line, with the live display."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from resmaster_flows.watch.progress import Progress
from resmaster_flows.watch.terminal import say, terminal
from resmaster_flows.workplace import computed_here, on_workers
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.errors import ConfigError, ResMasterError, UserError
from resmaster_stages.models.places import at_hub
from resmaster_stages.redaction import one_line, printable, quoted

if TYPE_CHECKING:
    from resmaster_flows.build import BuildResult
    from resmaster_stages.planning.checks import Around


def execute(console: Console, build: Callable[[], BuildResult]) -> int:
    """Run a flow that builds a dataset, and print its result. Returns the exit status.

    build: calls the flow and returns its result. It also imports the flow, because importing Prefect takes seconds.
    """
    with terminal(Progress(), console):
        from prefect.exceptions import Pause

        from resmaster_flows.server import server_within_reach

        with server_within_reach():
            try:
                result = build()
            except Pause:
                raise ResMasterError(
                    "suspended on the Prefect server, which cannot resume a run that was started by hand; what is done "
                    "is kept: run the same command again to go on"
                ) from None
    return _finished(console, result)


def look_around(config: DatasetConfig) -> Around:
    """What is around a build: where its stages run, and what `require_surroundings` says against it."""
    from resmaster_stages.planning.checks import Around

    try:
        require_surroundings(config)
    except UserError as error:
        return Around(here=False, mistakes=(str(error),))
    return Around(computed_here(config.dispatch))


def require_surroundings(config: DatasetConfig) -> None:
    """Check what a build needs beside its input: Prefect's settings, the server with the deployment if workers are to
    do the work, and the cluster if one is configured.

    Raises UserError.
    """
    said = StringIO()
    try:
        with redirect_stderr(said):
            import_module("prefect.context")  # reads the settings
            from resmaster_flows.server import require_answer, require_result_storage
    except (ValueError, OSError) as error:
        raise UserError(
            f"Prefect's settings cannot be used ({_settings_at_fault(error)}); mend or unset them"
        ) from error

    require_answer()
    if config.dispatch.where == "dask" or config.dispatch.where == "ray":
        from resmaster_flows.clusters import connect

        connect(config.dispatch.where)
    if on_workers(config.dispatch):
        from resmaster_flows.server_runs import deployed

        deployed(config.dispatch)
    require_result_storage()
    sys.stderr.write(said.getvalue())  # of settings that the errors above do not tell of
    with suppress(ConfigError):  # the checks of the configuration tell of a folder that is not there
        if not at_hub(config.model.id):
            hide_bars()  # such a model downloads nothing and loads in a second


def hide_bars() -> None:
    """Switch off the progress bars of the libraries that load models. Must be called before these are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _settings_at_fault(error: Exception) -> str:
    """The settings that Prefect turned down, and why, in one line."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    found = [
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
        for each in error.errors(include_url=False)
        if each["type"] != "default_factory_not_called"  # only follows from another one
    ]
    return one_line(f"{error.title}: {'; '.join(found)}")


def _finished(console: Console, result: BuildResult) -> int:
    for shard, error in result.errors.items():
        say(console, Text.assemble((f"shard {int(shard):06d} not finished:", "red"), f" {printable(error)}"))
    failed = f", {result.samples_failed} failed (see errors/)" if result.samples_failed else ""
    say(console, f"{result.samples} samples{failed} in {result.dataset_url}")
    if result.errors:
        say(
            console,
            f"{len(result.errors)} shards are missing; try again with: resmaster repair {quoted(result.dataset_url)}",
        )
    if result.shortfall:
        say(console, result.shortfall)
    print(f"report: {printable(result.report_url)}")
    return 0 if result.finished else 1
