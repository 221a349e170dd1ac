"""docs/deploying.md, followed word by word in a copy of the checkout: each command as it stands there, in its order.

The stages are stand-ins, and the ports are free ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.checkout import ROOT
from tests.s3_server import free_ports
from tests.server.conftest import POOL, wait
from tests.test_infra import FOLLOWED

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is under version control, with this environment as its `.venv`."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and not name.startswith(("resmaster_stages/", "docs/images/")) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "resmaster_stages").symlink_to(ROOT / "resmaster_stages")
    venv = Path(sys.prefix)
    (folder / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / part).symlink_to(venv / part)
    (folder / ".venv" / ".installed").touch()  # later than pyproject.toml: nothing is installed
    return folder


class Reader:
    """Somebody who types commands into one shell, in the checkout."""

    def __init__(self, folder: Path) -> None:
        port = free_ports(7)
        here = [folder, folder / "flows", folder / "tasks"]
        path = [folder / "tests" / "server" / "stand_ins", *here]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "AWS"))}
        self.environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "STACK": f"--port {port + 5} --view-port {port + 6} --store-port {port}",
            "OMP_NUM_THREADS": "1",
        }
        self.folder = folder
        self.begun: list[subprocess.Popen[bytes]] = []

    def type(self, command: str) -> str:
        """Run a command to its end, and keep what it did to the environment."""
        note = self.folder / "environment"
        done = subprocess.run(
            ["bash", "-c", f"{command}\nstatus=$?; env -0 >{note}; exit $status"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        self.environment = dict(line.split("=", 1) for line in note.read_text().split("\0") if line)
        return done.stdout + done.stderr

    def leave_running(self, command: str) -> None:
        self.begun.append(
            subprocess.Popen(
                command.split(),
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def end(self) -> None:
        for process in self.begun:
            process.terminate()
        for process in self.begun:
            process.wait()


def commands_of_the_page() -> list[str]:
    page = (ROOT / "docs" / "deploying.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def reader(checkout: Path) -> Iterator[Reader]:
    reader = Reader(checkout)
    try:
        yield reader
    finally:
        reader.end()
        said = reader.type("make down")
    assert "server stopped" in said
    assert "view stopped" in said


def online(client: SyncPrefectClient) -> list[str]:
    return [worker.name for worker in client.read_workers_for_work_pool(POOL) if worker.status == "ONLINE"]


def test_the_page_is_followed(reader: Reader) -> None:
    todo = [command for command in commands_of_the_page() if command in FOLLOWED]
    assert sorted(todo) == sorted(FOLLOWED)
    todo.remove("make down")
    assert todo[:2] == ["make up", "source out/stack/env"]
    said: dict[str, str] = {command: reader.type(command) for command in todo[:2]}
    with (
        temporary_settings(
            {
                PREFECT_API_URL: reader.environment["PREFECT_API_URL"],
                PREFECT_API_AUTH_STRING: reader.environment["PREFECT_API_AUTH_STRING"],
            }
        ),
        get_client(sync_client=True) as client,
    ):
        assert len(online(client)) == 2
        for command in todo[2:]:
            before = len(online(client))
            if command.startswith("infra/workers.sh"):
                reader.leave_running(command)
                more = 2 if command.endswith("2") else 1
                wait(lambda before=before, more=more: len(online(client)) == before + more)
            else:
                said[command] = reader.type(command)
        check(reader, client, said)


def check(reader: Reader, client: SyncPrefectClient, said: dict[str, str]) -> None:
    """What the page promises of its commands."""
    url = reader.environment["RESMASTER_VIEW_URL"]
    assert f"datasets: {url}" in said["make up"]
    assert "report: s3://datasets/picturebook/report/index.html" in said[FOLLOWED[2]]
    overview = subprocess.run(
        [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen({url!r}).read().decode())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "<html" in overview.stdout.lower()
    assert "resmaster-build-kubernetes" in said["make deploy POOL=kubernetes GPUS=8"]
    assert "removed work pool resmaster-kubernetes" in said["make undeploy POOL=kubernetes"]
    names = {each.name for each in client.read_work_pools()}
    assert names == {POOL}
    assert client.read_automations_by_name("resmaster-build-ended-badly")

    def built() -> Any:
        return [run for run in client.read_flow_runs() if run.name == "build mine" and run.state_name == "Completed"]

    wait(built, 300)
    status = reader.type("resmaster status s3://datasets/mine --json")
    assert '"samples": 4' in status
