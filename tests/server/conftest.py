"""One Prefect server, deployed to as users do, with a worker for builds and two workers of one place for shards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.checkout import PYTHONPATH, ROOT
from tests.s3_server import die_with_parent

POOL = "resmaster-process"
T = TypeVar("T")


def wait(ask: Callable[[], T], seconds: float = 120) -> T:
    """The first answer of `ask` that is not empty, asked for again and again."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.5)
    return answer


class Stack:
    """The server, its workers and a client. Processes have sessions of their own, so that they can be ended whole."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            # SQLite takes one writer at a time: what these tests do not ask for does not write
            "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "server" / "stand_ins"), PYTHONPATH]),
            "OMP_NUM_THREADS": "1",
        }
        if database := os.environ.get("RESMASTER_TEST_DATABASE"):
            self.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=self.home,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def start_worker(self, name: str, *queues: str) -> None:
        chosen = [word for queue in queues for word in ("--work-queue", queue)]
        self.start(
            name, "worker", "start", "--pool", POOL, "--name", name, *chosen, "--limit", "1" if "gpu" in queues else "8"
        )

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self, name: str) -> None:
        """kill -9 of a process and of all that it has started."""
        process = self.processes.pop(name)
        for pid in [process.pid, *descendants(process.pid)]:  # the worker first: it would report the end of its runs
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def run(self, deployment: str, **parameters: object) -> UUID:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def read(self, run: UUID) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run)

    def children(self, run: UUID) -> list[FlowRun]:
        with self.client() as client:
            below = FlowRunFilterParentFlowRunId(any_=[run])
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=below))

    def ended(self, run: UUID, seconds: float = 120) -> FlowRun:
        """A run, as soon as it has ended."""

        def look() -> FlowRun | None:
            found = self.read(run)
            return found if found.state is not None and found.state.is_final() else None

        return wait(look, seconds)


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    below = [int(line) for line in found.stdout.split()]
    return [each for child in below for each in (child, *descendants(child))]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("prefect"))
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port))
    try:
        wait(stack.healthy)
        with temporary_settings({PREFECT_API_URL: stack.api}):
            yield stack
    finally:
        for name in reversed(list(stack.processes)):
            stack.kill(name)


@pytest.fixture(scope="session")
def deployed(stack: Stack) -> Stack:
    """The server after `make deploy`."""
    command = [sys.executable, "-m", "resmaster_flows.deploy", "--pool", "process"]
    done = subprocess.run(command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return stack


@pytest.fixture(scope="session")
def workers(deployed: Stack) -> Stack:
    deployed.start_worker("builds", "builds")
    for name in ("gpu-a", "gpu-b"):
        deployed.start_worker(name, "gpu", "gpu-repair")
    with deployed.client() as client:
        wait(lambda: len(client.read_workers_for_work_pool(POOL)) == 3)
    return deployed
