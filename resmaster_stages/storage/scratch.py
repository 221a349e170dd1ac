"""Scratch folders on this machine's disk. They are deleted after their block, or later if the process was killed.

Invariant: the folder of a living process is never deleted. The process holds a lock on a file in the folder while it
lives, and the lock is visible from other containers too.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "resmaster-scratch-"
LOCK = ".lock"
YOUNG_SECONDS = 60.0
"""Younger folders are left alone, because their process may not have locked them yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder below TMPDIR, deleted after the block."""
    reclaim_once(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, open(os.path.join(name, LOCK), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(name) / "files"
        folder.mkdir()
        yield folder


@functools.lru_cache(maxsize=1)
def reclaim_once(parent: str) -> None:
    """`reclaim`, once per process."""
    reclaim(parent)


def reclaim(parent: str) -> int:
    """Delete the scratch folders of this user's dead processes below `parent`. Returns their number. Ignores failed
    deletions. Others may have put anything of such a name there, and links are not followed."""
    count = 0
    for folder in Path(parent).glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if not ours or time.time() - found.st_mtime < YOUNG_SECONDS:
                continue
            with open(folder / LOCK, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
                shutil.rmtree(folder)
                count += 1
    return count
