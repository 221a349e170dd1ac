"""Finds a sample that kills the whole process (by a crash in native code, or by the out-of-memory killer).

While samples are at work, a small file in the dataset's `cache/`, the breadcrumb, names them. A run that finds a
breadcrumb knows that an earlier run was killed there, and gives each named sample a strike. `compute` runs a slot with
a sample of two strikes one sample at a time, and leaves a sample out after three strikes. (A commit that is made again
keeps its slots, because its bytes depend on them.)

Invariants:
- A run that ends in an orderly way (done, failed, stopped) removes its breadcrumb and gives no strikes. A lost GPU does
  not count as orderly: the samples that were computed get a strike.
- A breadcrumb whose process still lives on this host gives no strikes.
- Strikes count for one attempt. The next attempt, and a commit that is made again, try every sample anew.
- A breadcrumb that cannot be written is an error, because without breadcrumbs a deadly sample would kill every run.
  Only if another process has committed the shard, and deleted its cache, no breadcrumb is needed.
- While samples are computed, those before them may still be finished. The breadcrumb names both, because either may be
  the one that kills.
- After a first strike nothing overlaps (`compute`), so an innocent neighbour gets at most one strike.
- Samples that are read ahead do not count as at work.
- A batch gets a breadcrumb of its own if the batch before took `SLOW_SECONDS`, or after a first strike in the shard.
  Otherwise one breadcrumb names the whole shard, so that writing breadcrumbs does not take longer than computing.
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
from resmaster_stages.errors import UserError

STORE_ERRORS = (OSError, UserError)
"""What `storage` makes of the errors of a store."""

SLOW_SECONDS = 1.0
"""A batch gets a breadcrumb of its own if the batch before took at least this long."""

ALONE_STRIKES = 2
"""With this many strikes, a sample runs alone."""
OUT_STRIKES = 3
"""With this many strikes, a sample is left out."""


class Breadcrumbs:
    """The breadcrumb of one stage of one shard with the samples `keys`."""

    def __init__(
        self, commits: Commits, shard: int, keys: Sequence[str], cache: Collection[str], attempt: int = 1
    ) -> None:
        """cache: names of the files in the shard's cache folder. attempt: its number; 0: a commit is made again."""
        self.folder, self.keys, self._attempt = commits.folder, list(keys), attempt
        self._name = layout.breadcrumb(commits.stage, commits.stage_hash, shard)
        self._me = process_name()
        self._written: list[str] | None = None
        self._since: float | None = None
        self._computed: list[str] = []
        self.strikes = self._read() if self._name in cache else {}
        """Key -> how often a process died while the sample was at work."""

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self.folder.read(self._name))
            strikes = {str(key): int(count) for key, count in found["strikes"].items()}
            if found["attempt"] != self._attempt:
                return {}
            blamed = [] if lives(found["process"]) else [str(key) for key in found["at"]]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # not a valid breadcrumb: it gives no strikes
        for key in blamed:
            strikes[key] = strikes.get(key, 0) + 1
        return {key: count for key, count in strikes.items() if key in set(self.keys)}

    def at(self, keys: Sequence[str], finishing: Sequence[str] = ()) -> None:
        """Note that a batch with the samples `keys` begins, while the samples `finishing` are still being finished."""
        now = time.monotonic()
        exact = bool(self.strikes) or (self._since is not None and now - self._since >= SLOW_SECONDS)
        self._since, self._computed = now, list(keys)
        where = [*finishing, *keys] if exact else self.keys
        if where != self._written:
            self._write(where)

    def blame(self) -> None:
        """Give the samples of the current batch a strike, because the batch broke the device."""
        for key in self._computed:
            self.strikes[key] = self.strikes.get(key, 0) + 1
        with suppress(*STORE_ERRORS):
            self._write([])

    def leave(self) -> None:
        """Note an orderly end: nothing is at work any more. Strikes are kept until the shard is committed."""
        with suppress(*STORE_ERRORS):
            if self.strikes:
                self._write([])
            elif self._written is not None:
                self.folder.remove(self._name)

    def forget(self) -> None:
        """Remove the strikes, because the attempt is over: it is committed, or it has failed for good."""
        if self.strikes:
            with suppress(*STORE_ERRORS):
                self.folder.remove(self._name)

    def _write(self, where: list[str]) -> None:
        found = {"process": self._me, "attempt": self._attempt, "at": where, "strikes": self.strikes}
        with suppress(FileNotFoundError, FileExistsError):  # the folder was deleted while it was made or written to
            self.folder.write(self._name, json.dumps(found, sort_keys=True).encode())
            self._written = where


def process_name(pid: int | None = None) -> str:
    """Host, pid and start time of a process (default: this one). No other process, past or future, has this name."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {pid} {_start_of(pid)}"


def lives(name: str) -> bool:
    """Whether the process with this name runs on this host. A process on another host counts as dead."""
    host, _, pid = name.rpartition(" ")[0].rpartition(" ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and belongs to another user
    return process_name(int(pid)) == name


def _start_of(pid: int) -> str:
    """Clock ticks from boot to the start of a process; "-" if it has ended, or if there is no /proc."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-"
    return "-" if state in ("Z", "X") else facts[18]
