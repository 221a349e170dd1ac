"""Tests by small writes whether a store does what builds need. Works before a dataset exists.

Invariants:
- Every probe writes under random hidden names and removes them afterwards, with the folders that it made, even after an
  error.
- A check that cannot be made is reported as untested, never as passed.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.storage.filesystem import Folder

State = Literal["ok", "failed", "untested", "lacking"]
"""`lacking`: a store can do without it, and something other than a build cannot use it."""

START_WRITERS = 4
"""Number of racing writers in the probe at the start of a build, which takes 6 requests in total."""
WRITERS, ROUNDS = 8, 3
"""Number of racing writers, and of races, in a full examination."""

OVERRIDE = "--allow-overwriting-store (allow_overwriting_store: true)"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: State
    detail: str


def require_one_winner(folder: Folder) -> None:
    """Race a few writers for one name in `folder`, once per build. Raises UserError if two of them win."""
    with _Probe.at(folder, keep_folders=True) as probe:
        winners = probe.race(START_WRITERS)
    if winners > 1:
        raise UserError(
            f"{folder.url}: this store lets two writers both win (it ignores If-None-Match), so two processes could "
            f"commit the same shard; choose another store, or run one process at a time with {OVERRIDE}"
        )


def examine(folder: Folder) -> list[Finding]:
    """Check everything that a build needs from the store at `folder`."""
    findings: list[Finding] = []
    with _Probe.at(folder, keep_folders=False) as probe:
        for name, check in _CHECKS:
            if findings and findings[0].state == "failed":
                findings.append(Finding(name, "untested", f"needs: {_CHECKS[0][0]}"))
            else:
                findings.append(_finding(name, partial(check, probe)))
    return findings


def _finding(name: str, check: Callable[[], tuple[State, str]]) -> Finding:
    try:
        state, detail = check()
    except (ResMasterError, OSError) as error:
        state, detail = "failed", " ".join(str(error).split()) or type(error).__name__
    return Finding(name, state, detail)


@dataclass
class _Probe:
    """Hidden names in a folder, which are all removed at the end."""

    folder: Folder
    written: list[str] = field(default_factory=list)

    @classmethod
    @contextmanager
    def at(cls, folder: Folder, keep_folders: bool) -> Iterator[_Probe]:
        """A probe of `folder`. Folders that it made stay only with `keep_folders`, and if no error was raised."""
        known = _existing(Path(folder.path)) if folder.local else None
        probe, good = cls(folder), False
        try:
            yield probe
            good = True
        finally:
            for name in probe.written:
                try:
                    folder.remove(name)
                except (ResMasterError, OSError):  # the check "delete" reports it
                    continue
            if known is not None and not (good and keep_folders):
                _remove_empty(Path(folder.path), known)

    def name(self) -> str:
        """A new name, which is removed at the end."""
        self.written.append(probe_name(uuid.uuid4().hex[:8]))
        return self.written[-1]

    def race(self, writers: int) -> int:
        """Let writers race for one name. Returns how many were told that they created it; 0 if answers were lost.

        Raises OSError if there is one winner and the stored content is not the winner's.
        """
        name, barrier = self.name(), threading.Barrier(writers)

        def write(number: int) -> int | None:
            barrier.wait()
            try:
                self.folder.create(name, str(number).encode())
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(writers) as pool:
            won = [number for number in pool.map(write, range(writers)) if number is not None]
        if len(won) == 1 and self.folder.read(name) != str(won[0]).encode():
            raise OSError(f"the content of {name} is not that of the one writer that was told to have created it")
        return len(won)


# ----------------------------------------------------------------------------------------------------------------------
# the checks


def _write_and_read(probe: _Probe) -> tuple[State, str]:
    name = probe.name()
    for content in (b"first", b"second"):
        probe.folder.write(name, content)
        found = probe.folder.read(name)
        if found != content:
            return "failed", f"read {found!r} right after {content!r} was written"
    return "ok", "a new and a replaced object are read back at once"


def _list(probe: _Probe) -> tuple[State, str]:
    name = probe.name()
    probe.folder.write(name, b"listed")
    if name not in probe.folder.names(""):
        return "failed", "a new object is not in the listing right away: workers would not see each other's commits"
    return "ok", "a new object is listed at once"


def _create_once(probe: _Probe) -> tuple[State, str]:
    name = probe.name()
    probe.folder.create(name, b"first")
    try:
        probe.folder.create(name, b"second")
    except FileExistsError:
        if probe.folder.read(name) != b"first":
            return "failed", "the second create was refused and yet replaced the first one's content"
        return "ok", "the second create of a name is refused"
    return "failed", f"the second create of a name succeeds; builds need {OVERRIDE} and one process at a time"


def _create_racing(probe: _Probe) -> tuple[State, str]:
    for number in range(1, ROUNDS + 1):
        winners = probe.race(WRITERS)
        if winners > 1:
            return "failed", f"{winners} of {WRITERS} racing writers won (round {number} of {ROUNDS})"
    return "ok", f"{WRITERS} racing writers, {ROUNDS} rounds: never two winners"


def _delete(probe: _Probe) -> tuple[State, str]:
    name = probe.name()
    probe.folder.write(name, b"deleted")
    probe.folder.remove(name)
    try:
        probe.folder.read(name)
    except FileNotFoundError:
        if name in probe.folder.names(""):
            return "failed", "a deleted object is still listed"
        return "ok", "a deleted object is gone at once"
    return "failed", "a deleted object can still be read"


def _unfinished_uploads(probe: _Probe) -> tuple[State, str]:
    try:
        probe.folder.unfinished_uploads()
    except UserError as error:
        return "lacking", f"gc cannot end them ({error}); end them by a lifecycle rule of the bucket"
    return "ok", "gc can find and end them"


_CHECKS: list[tuple[str, Callable[[_Probe], tuple[State, str]]]] = [
    ("write, read back", _write_and_read),
    ("list", _list),
    ("create once", _create_once),
    ("create once, racing", _create_racing),
    ("delete", _delete),
    ("unfinished uploads", _unfinished_uploads),
]


def _existing(path: Path) -> Path:
    """The deepest folder of a path that exists."""
    while not path.exists():
        path = path.parent
    return path


def _remove_empty(path: Path, known: Path) -> None:
    """Remove a folder and its parents below `known`, if they are empty."""
    while path != known:
        try:
            path.rmdir()
        except OSError:  # not empty: another process has begun to use it
            return
        path = path.parent


_PROBE = re.compile(r"\.probe-[0-9a-f]{8}")


def probe_name(token: str) -> str:
    """The name of a probe's file."""
    return f".probe-{token}"


def is_probe(name: str) -> bool:
    """Whether `name` is that of a probe's file."""
    return bool(_PROBE.fullmatch(name))
