"""Shows a push in the terminal: a progress bar with rate and time left, and a line per commit.

If the output is not a terminal, plain lines and no bar are printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from resmaster_flows.watch.progress import notes
from resmaster_flows.watch.terminal import say
from resmaster_stages.progress import Event, listening
from resmaster_stages.publish.hub import Committed, Sent
from resmaster_stages.redaction import printable


@contextmanager
def pushing(console: Console, place: str, total_bytes: int) -> Iterator[None]:
    """Within the block, show how much of `total_bytes` is sent to `place`."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(escape(printable(place)), total=total_bytes)

    def hear(event: Event) -> None:
        if isinstance(event, Sent):
            bar.update(task, advance=event.bytes)
        elif isinstance(event, Committed):
            say(console, f"  {event.files:,} files committed, {event.left:,} to go")

    with bar, listening(hear), listening(notes(lambda line: say(console, f"  {line}"))):
        yield
