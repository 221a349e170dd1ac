"""Scenes with the real programs: `resmaster run` without a server, and a Prefect server with its workers.

They start as users start them, with stand-in stages, in sessions of their own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.soak.processes import Difference
from benchmarks.soak.recipes import Recipe
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.inspection.status import pending
from tests.checkout import PYTHONPATH
from tests.s3_server import die_with_parent

RUN_SECONDS = 240.0
"""A run that has not ended after so long hangs."""
ORPHAN_SECONDS = 30.0
"""What a killed run has started may live so much longer."""
FIRST_SECONDS = 6.0
"""A run is struck before so long after its start, or, if one has ended by itself, within the time that it took."""
BUILD_SECONDS = 500.0
"""So long after the last blow, a deployed build must be finished: a server waits minutes before it gives up a run."""


# ----------------------------------------------------------------------------------------------------------------------
# the command line


class CommandLine:
    """`resmaster`, with stand-in stages that take their time, on one dataset."""

    def __init__(self, made: Recipe, root: str, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.config.write_text(json.dumps({**made.values, "root": root}))  # JSON is YAML
        self.environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PREFECT_HOME": str(folder / "home"), **environment}

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command."""
        with (self.folder / "said").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.soak.slow_cli", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def run(self) -> subprocess.Popen[bytes]:
        """Start `resmaster run`."""
        return self.begin("run", str(self.config))

    def end(self, command: subprocess.Popen[bytes]) -> int:
        """Wait for a command. Its exit status. Raises Difference if it hangs or leaves a traceback."""
        try:
            status = command.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            kill_all([command.pid, *descendants(command.pid)])
            command.wait()
            raise Difference(f"resmaster did not end within {RUN_SECONDS:g} s: {self.said()}") from None
        if "Traceback (most recent call last)" in (said := self.said()):
            raise Difference(f"resmaster ended by a traceback: {said}")
        return status

    def said(self) -> str:
        """The last that was printed."""
        return (self.folder / "said").read_text(errors="replace")[-4000:]


def struck_runs(made: Recipe, root: str, folder: Path, seed: int, blows: int) -> Counter[str]:
    """Start `resmaster run` again and again, and kill it: its whole group, its main process, or one that it has
    started. Then run it in peace."""
    chance, done, seconds = random.Random(seed), Counter[str](), FIRST_SECONDS
    command_line = CommandLine(made, root, folder)
    for _ in range(blows):
        command, begun = command_line.run(), time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            command.wait(chance.uniform(0.2, 1) * seconds)
        below = descendants(command.pid)
        if command.poll() is None:
            victims = {
                "group": [command.pid, *below],
                "main": [command.pid],
                **({"child": below[-1:]} if below else {}),
            }
            victim = chance.choice(sorted(victims))
            kill_all(victims[victim])
            done += Counter({"kills": 1, f"kills of its {victim}": 1})
        if command_line.end(command) == 0:
            seconds = time.monotonic() - begun
        if left := still_alive([command.pid, *below], ORPHAN_SECONDS):
            kill_all(left)
            raise Difference(f"resmaster was killed and left {len(left)} processes behind")
    if status := command_line.end(command_line.run()):
        raise Difference(f"resmaster run, left in peace, ended {status}: {command_line.said()}")
    if any((todo := pending(open_dataset(root))).values()):
        raise Difference(f"resmaster run ended 0, and {todo} are pending")
    return done


def kill_all(pids: list[int]) -> None:
    """kill -9."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def still_alive(pids: list[int], seconds: float) -> list[int]:
    """Those that have not ended after some time."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if words_of(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, below) for each in (child, *descendants(child))]


def words_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


# ----------------------------------------------------------------------------------------------------------------------
# a deployed server


@contextmanager
def deployed(home: Path) -> Any:
    """A Prefect server on a free port, the deployments, a worker for builds and two for shards."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tests.server.conftest import POOL, Stack, wait

    home.mkdir()
    stack = Stack(home)
    start(stack, "server")
    try:
        wait(stack.healthy)
        with temporary_settings({PREFECT_API_URL: stack.api}):
            command = [sys.executable, "-m", "resmaster_flows.deploy", "--pool", "process"]
            subprocess.run(command, env=stack.environment, capture_output=True, check=True)
            for name in WORKERS:
                start(stack, name)
            with stack.client() as client:
                wait(lambda: len(client.read_workers_for_work_pool(POOL)) == len(WORKERS))
            yield stack
    finally:
        for name in reversed(list(stack.processes)):
            stack.kill(name)


WORKERS: Mapping[str, tuple[str, ...]] = {
    "builds": ("builds",),
    "gpu-a": ("gpu", "gpu-repair"),
    "gpu-b": ("gpu", "gpu-repair"),
}
"""Worker -> its queues."""


def start(stack: Any, name: str) -> None:
    """Start the server or a worker, again if it was killed."""
    if name == "server":
        stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port))
    else:
        stack.start_worker(name, *WORKERS[name])


def struck_server(made: Recipe, root: str, folder: Path, seed: int, blows: int) -> Counter[str]:
    """A deployed build, in which the server and the workers are killed and started again; then one in peace."""
    from tests.server.conftest import wait

    chance, done = random.Random(seed), Counter[str]()
    dispatch = {"poll_seconds": 0.5, "shards_per_run": 1, "stall_seconds": 60}
    config = {**made.values, "root": root, "dispatch": dispatch}
    with deployed(folder / "prefect") as stack:
        command = None
        if chance.random() < 0.5:
            command_line = CommandLine(replace(made, values=config), root, folder, PREFECT_API_URL=stack.api)
            command = command_line.run()
        else:
            stack.run("build-dataset/resmaster-build", config=config)
        for _ in range(blows):
            time.sleep(chance.uniform(2, 10))
            victim = chance.choice(("server", *WORKERS))
            stack.kill(victim)
            done += Counter({"kills": 1, f"kills of {'the server' if victim == 'server' else 'a worker'}": 1})
            time.sleep(chance.uniform(0, 3))
            start(stack, victim)
            wait(stack.healthy)
        if command is not None:
            command_line.end(command)
        deadline = time.monotonic() + BUILD_SECONDS
        while not finished(root):
            if time.monotonic() > deadline:
                raise Difference(f"a deployed build was not finished {BUILD_SECONDS:g} s after the last blow")
            stack.ended(stack.run("build-dataset/resmaster-build", config=config), BUILD_SECONDS)
            time.sleep(1)
    return done


def finished(root: str) -> bool:
    """Whether everything is committed."""
    try:
        return not any(pending(open_dataset(root)).values())
    except Exception:  # the build has not planned it yet
        return False
