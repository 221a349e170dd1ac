"""Forks children, and kills, ends and stops them at random moments.

The parent reads and writes no dataset itself: it has no threads that a child could inherit half-way, and what it has
loaded, such as a model, every child has at once.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from resmaster_stages.errors import first_line

Work = Callable[..., Any]

ROUND_SECONDS = 300.0
"""Processes that have not ended by themselves so long after the last blow are stuck."""
LONGEST_STOP_SECONDS = 3.0
TELL = signal.SIGUSR1
"""Makes a child write to standard error what each of its threads does."""
CRASH = "crash: "
"""Begins a line on standard error: a child ended by an error that nobody foresaw."""


class Difference(Exception):
    """A promise is broken. The message says which one."""


def fork(work: Work, *arguments: object) -> int:
    """Run `work` in a child, which dies with this process. Its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        faulthandler.register(TELL, file=2)
        _with_own_lock(tqdm)
        work(*arguments)
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    except BaseException as error:
        told = f"{traceback.format_exc()}{CRASH}{type(error).__name__}: {first_line(error)}\n"
        os.write(2, told.encode(errors="replace"))
    finally:
        os._exit(status)


def _with_own_lock(bars: type[tqdm[Any]]) -> None:
    """Let progress bars have a lock of this process. tqdm's is shared by all forks: a child that is killed while it
    holds the lock would stop all others."""
    bars.set_lock(threading.RLock())
    for each in bars.__subclasses__():
        _with_own_lock(each)


def ask(work: Work, *arguments: object) -> Any:
    """The answer of `work`, computed in a child. Raises its Difference, or one that tells how it failed."""
    with tempfile.TemporaryFile() as answer:

        def tell() -> None:
            try:
                found = work(*arguments)
            except Exception as error:
                told = str(error) if isinstance(error, Difference) else traceback.format_exc()
                found = Difference(told)
            answer.write(pickle.dumps(found))
            answer.flush()

        status = os.waitstatus_to_exitcode(os.waitpid(fork(tell), 0)[1])
        answer.seek(0)
        found = pickle.load(answer) if status == 0 else Difference(f"a process that was left in peace ended {status}")
    if isinstance(found, Difference):
        raise found
    return found


@dataclass
class Crew:
    """Processes that work beside each other, are struck at random, and are replaced."""

    begin: Callable[[], int]
    """Starts one more; its id."""
    chance: random.Random
    mean_seconds: float = 0.25
    """Mean time between two blows."""
    done: Counter[str] = field(default_factory=Counter)
    """What was done to them."""
    alive: set[int] = field(default_factory=set)
    stopped: dict[int, float] = field(default_factory=dict)
    """Process -> when it goes on."""

    def disturbed(self, processes: int, blows: int, endless: bool = False) -> Counter[str]:
        """Let `processes` work; strike until there were so many `blows`, or all have ended; then wait for the end of
        all. endless: they do not end by themselves, and are killed."""
        for _ in range(processes):
            self.alive.add(self.begin())
        while self.alive and self.done.total() < blows:
            self._sleep(self.chance.expovariate(1 / self.mean_seconds))
            if self.alive:
                self._strike(self.chance.choice(sorted(self.alive)))
        if endless:
            self.end()
        deadline = time.monotonic() + ROUND_SECONDS
        while self.alive:
            self._sleep(0.02)
            if time.monotonic() > deadline:
                self._tell()
                self.end()
                raise Difference(f"processes did not end within {ROUND_SECONDS:g} s")
        return self.done

    def _tell(self) -> None:
        """Let those that are left say where they are."""
        for pid in self.alive:
            os.kill(pid, TELL)
        time.sleep(1)

    def end(self) -> None:
        """Kill all that are left."""
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.alive.clear()

    def _sleep(self, seconds: float) -> None:
        """Wait, waking those whose stop is over; forget those that have ended."""
        until = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            for pid in [pid for pid, end in self.stopped.items() if end <= now]:
                os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]
            if now >= until:
                break
            time.sleep(min(0.05, until - now))
        for pid in sorted(self.alive):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._gone(pid)

    def _strike(self, victim: int) -> None:
        blow = self.chance.choices(("kills", "terminations", "stops"), (6, 2, 2))[0]
        self.done[blow] += 1
        if blow == "stops":
            os.kill(victim, signal.SIGSTOP)
            self.stopped[victim] = time.monotonic() + self.chance.uniform(0, LONGEST_STOP_SECONDS)
            return
        os.kill(victim, signal.SIGKILL if blow == "kills" else signal.SIGTERM)
        if blow == "terminations":
            os.kill(victim, signal.SIGCONT)  # a process that is stopped cannot end
        os.waitpid(victim, 0)
        self._gone(victim)
        self.alive.add(self.begin())

    def _gone(self, pid: int) -> None:
        self.alive.discard(pid)
        self.stopped.pop(pid, None)
