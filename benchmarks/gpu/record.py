"""What a run found, as JSON on disk after every entry, and how much time a step has left. Imports no torch.

Invariants:
- The file is whole at every moment: a run that is killed leaves what it had found.
- What failed stands in the file with the end of its traceback; nothing that failed is left out.
- One process writes at a time: the step at work, and between steps the process that started it.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACE_CHARACTERS = 2000
"""What is kept of a traceback: its end."""


def read(path: Path) -> dict[str, Any]:
    """The JSON of a run; empty parts where there is none yet."""
    if not path.exists():
        return {"about": {}, "steps": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the JSON of a run."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def trace(error: BaseException) -> str:
    """The end of an error's traceback."""
    return "".join(traceback.format_exception(error))[-TRACE_CHARACTERS:]


@dataclass(frozen=True)
class Record:
    """One step's part of the JSON."""

    path: Path
    step: str

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes the step's part, and writes it."""
        content = read(self.path)
        change(content["steps"].setdefault(self.step, {"found": {}}))
        write(self.path, content)

    def about(self, **facts: Any) -> None:
        """Facts of the whole run."""
        content = read(self.path)
        content["about"].update(facts)
        write(self.path, content)

    def put(self, name: str, value: Any) -> None:
        """A finding of this step."""
        self.change(lambda step: step["found"].update({name: value}))

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """One more entry of a list of findings."""
        self.change(lambda step: step["found"].setdefault(name, []).append(entry))

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Adds what `measure` finds, or its error, to the list `name`, with `labels`; returns the entry.

        An error costs this entry alone; where it poisoned the device, the entries after it say so too.
        """
        try:
            entry = {**labels, **measure()}
        except Exception as error:
            entry = {**labels, "error": trace(error)}
        self.add(name, entry)
        print(f"{self.step}: {name}: {json.dumps(entry)[:400]}", flush=True)
        return entry


@dataclass(frozen=True)
class Run:
    """What a step is told."""

    record: Record
    device: str
    """`cuda` or `cpu`."""
    rehearse: bool
    """Toy sizes: every line of the step runs, and no number means anything."""
    until: float
    """When the step should have ended: seconds since the epoch."""
    out: Path
    """Folder of what comes back."""

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    def skip(self, name: str, needed: float, **labels: Any) -> bool:
        """Whether less than `needed` seconds are left; the list `name` then says what was not measured."""
        left = self.left()
        if self.rehearse or left >= needed:
            return False
        self.record.add(name, {**labels, "skipped": f"{left:.0f} s were left, about {needed:.0f} s were needed"})
        return True
