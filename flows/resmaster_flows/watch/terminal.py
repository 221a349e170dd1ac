"""Shows a build in the terminal: one progress bar with the time left and the current work, and a line per commit.

If the output is not a terminal, plain lines and no bar are printed. This module does not use Prefect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from resmaster_flows.watch.events import Dispatched
from resmaster_flows.watch.pace import spell_seconds
from resmaster_flows.watch.progress import Progress, notes
from resmaster_stages.progress import Event, Listener, ShardDone, listening
from resmaster_stages.redaction import printable_lines


class SafeConsole(Console):
    """A console that shows characters which act without being seen as visible escapes, in text and tables alike."""

    hushed = False
    """Whether only results and errors are told, without bars (`say`)."""
    heard: Callable[[str], object] | None = None
    """What also gets every text that is said here."""

    @property
    def is_terminal(self) -> bool:
        """As Rich's. A hushed console draws no bars."""
        return not self.hushed and super().is_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        """As Rich's, which this console calls for every `str` that it is given."""
        return super().render_str(printable_lines(text), **options)


def say(console: Console, text: str | Text, *, result: bool = False) -> None:
    """Print `text` without markup (names may hold brackets) and without line breaks in paths. Bytes of names that are
    no UTF-8 are escaped. result: it is a result or an error, which a hushed console prints as well."""
    if isinstance(text, str):
        text = text.encode("utf-8", "backslashreplace").decode()
    if isinstance(console, SafeConsole):
        if console.heard:
            console.heard(str(text).strip())
        if console.hushed and not result:
            return
    put(console, text)


def put(console: Console, text: str | Text) -> None:
    """Print `text` as it is, whatever the console logs."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def terminal(progress: Progress, console: Console) -> Iterator[Bar]:
    """Within the block, `progress` receives all events, and the terminal shows it."""
    bar = Bar(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[images]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(**_shown(progress))

    def draw(event: Event) -> None:
        bar.update(task, **_shown(progress))

    with (
        bar,
        listening(progress.hear),
        listening(_lines(progress, console)),
        listening(notes(lambda line: say(console, f"  {line}"))),
        listening(draw),
    ):
        yield bar


def _shown(progress: Progress) -> dict[str, Any]:
    """The fields of the bar."""
    failed = f"  [red]{progress.samples_failed} failed" if progress.samples_failed else ""
    return {
        "description": _now(progress),
        "total": 100 if progress.samples_total else None,
        "completed": progress.percent,
        "images": f"images: {progress.images}/{progress.images_total}",
        "left": f"time left: {spell_seconds(progress.seconds_left)}{failed}",
    }


def _now(progress: Progress) -> str:
    """What is being done now."""
    from resmaster_stages.dataset.stages import STAGES  # not needed by verbs that only print

    if progress.dispatched:
        return _spell(progress.dispatched)
    if progress.now is None:
        return "starting"
    place = f"{progress.shards[progress.now.shard].place}/{len(progress.shards)}"
    step = f"  step {progress.step.done}/{progress.step.total}" if progress.step else ""
    return f"shard {place}  {STAGES[progress.now.stage].doing}{step}"


def _spell(dispatched: Dispatched) -> str:
    runs = f"{dispatched.running} runs at work, {dispatched.waiting} waiting"
    return f"{dispatched.done} of {dispatched.total} shards finished; {runs}"


def _lines(progress: Progress, console: Console) -> Listener:
    """A listener that prints a line for each committed stage of a shard, and for each progress of other runs."""
    last: Dispatched | None = None

    def hear(event: Event) -> None:
        nonlocal last
        if isinstance(event, ShardDone) and not event.cached:
            seconds = spell_seconds(progress.shards[event.shard].last_seconds)
            say(console, f"  shard {event.shard:06d}  {event.stage:<9} committed in {seconds}")
        elif isinstance(event, Dispatched) and event != last:
            last = event
            say(console, f"  {_spell(event)}")

    return hear
