"""Finds the sample that takes the whole process with it (a crash in native code, the out-of-memory killer).

While samples are at work, a small file in the dataset's `cache/` names them. A run that finds such a file knows that an
earlier one was killed there, and gives each of its samples a strike: the driver runs suspects one by one, and leaves
them out after three strikes.

Invariants:
- Whoever ends in an orderly way (done, failed, stopped) takes its file away and blames nobody; a lost GPU is no such
  way.
- A file whose process still lives on this host blames nobody.
- While one sample is computed, those before it may still be finished: the file names both, for either may be what
  kills.
- After a first strike nothing overlaps (`compute`), so an innocent neighbour gets one strike at most, and no second
  one.
- A sample that is read ahead is not at work yet.
- Until a sample turns out to be slow, one file names all of the shard, so that a breadcrumb never costs more than its
  sample; after a first strike every batch has its own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import Commits

SLOW_SECONDS = 1.0
"""A batch that follows one this long gets a file of its own."""

ALONE_STRIKES = 2
"""From here on a sample runs alone."""
OUT_STRIKES = 3
"""From here on it does not run any more."""


class Breadcrumbs:
    """The breadcrumb of one stage of one shard, whose samples are `keys`."""

    def __init__(self, commits: Commits, shard: int, keys: Sequence[str], cache: Collection[str]) -> None:
        """cache: names of the files in the shard's cache."""
        self.folder, self.keys = commits.folder, list(keys)
        self._name = layout.breadcrumb(commits.stage, commits.stage_hash, shard)
        self._me = process_name()
        self._written: list[str] | None = None
        self._since: float | None = None
        self._computed: list[str] = []
        self.strikes = self._read() if self._name in cache else {}
        """Key -> how often a process died while it was at work."""

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self.folder.read(self._name))
            strikes = {str(key): int(count) for key, count in found["strikes"].items()}
            blamed = [] if lives(found["process"]) else [str(key) for key in found["at"]]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # not one of ours: it can accuse nobody
        for key in blamed:
            strikes[key] = strikes.get(key, 0) + 1
        return {key: count for key, count in strikes.items() if key in set(self.keys)}

    def at(self, keys: Sequence[str], finishing: Sequence[str] = ()) -> None:
        """A batch of these samples begins, while those before it are still `finishing`."""
        now = time.monotonic()
        exact = bool(self.strikes) or (self._since is not None and now - self._since >= SLOW_SECONDS)
        self._since, self._computed = now, list(keys)
        where = [*finishing, *keys] if exact else self.keys
        if where != self._written:
            self._write(where)

    def blame(self) -> None:
        """The batch that is computed broke the device: the same as if it had killed the process."""
        for key in self._computed:
            self.strikes[key] = self.strikes.get(key, 0) + 1
        with suppress(OSError):
            self._write([])

    def leave(self) -> None:
        """Nothing is at work any more, in an orderly way. Strikes stay until the shard is committed."""
        with suppress(OSError):
            if self.strikes:
                self._write([])
            elif self._written is not None:
                self.folder.remove(self._name)

    def forget(self) -> None:
        """The shard is committed: strikes are history."""
        if self.strikes:
            with suppress(OSError):
                self.folder.remove(self._name)

    def _write(self, where: list[str]) -> None:
        self.folder.write(
            self._name, json.dumps({"process": self._me, "at": where, "strikes": self.strikes}, sort_keys=True).encode()
        )
        self._written = where


def process_name(pid: int | None = None) -> str:
    """Host, pid and start of a process (default: this one): no other one, before or after, has the same name."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {pid} {_start_of(pid)}"


def lives(name: str) -> bool:
    """Whether the process of that name runs on this very host. One on another host counts as dead: nobody can tell."""
    host, _, pid = name.rpartition(" ")[0].rpartition(" ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, but another user's
    return process_name(int(pid)) == name


def _start_of(pid: int) -> str:
    """Clock ticks from boot to the start of a process; "-" if it has ended, or where there is no /proc."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-"
    return "-" if state in ("Z", "X") else facts[18]
