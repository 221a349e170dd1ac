"""Tells what a build decides, one line each, for its log and for the terminal.

Invariant: the number of lines does not grow with the number of shards. Of each kind of decision the first
`LINES_OF_A_KIND` are told, and progress is told by tenths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from resmaster_flows.watch.events import Decision, Dispatched
from resmaster_stages.progress import Event, Listener
from resmaster_stages.redaction import printable

LINES_OF_A_KIND = 20
TENTHS = 10


def decisions(say: Callable[[str], None]) -> Listener:
    """A listener that passes decisions, and the progress of runs elsewhere, to `say`."""
    said: Counter[str] = Counter()
    told: tuple[int, bool] | None = None

    def tell(line: str, kind: str) -> None:
        said[kind] += 1
        if not kind or said[kind] <= LINES_OF_A_KIND:
            say(printable(line))
        elif said[kind] == LINES_OF_A_KIND + 1:
            say(f"more lines about {kind} are left out; the table of the build's page has every run")

    def hear(event: Event) -> None:
        nonlocal told
        if isinstance(event, Decision):
            tell(event.line, event.kind)
        elif isinstance(event, Dispatched):
            now = (event.done * TENTHS // max(1, event.total), bool(event.running))
            if now != told:
                flipped = told is not None and told[0] == now[0]
                tell(spell(event), "runs at work" if flipped else "")
                told = now

    return hear


def spell(dispatched: Dispatched) -> str:
    """How far the work of other runs is, in one line."""
    runs = f"{dispatched.running} runs at work, {dispatched.waiting} waiting"
    return f"{dispatched.done} of {dispatched.total} shards finished; {runs}"
