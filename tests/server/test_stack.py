"""`make up` and `make down`: everything runs, once; then nothing does."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.checkout import PYTHONPATH, ROOT
from tests.s3_server import free_ports
from tests.test_hardening import modes

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(400)]

PROCESSES = ("server", "builds", "shards", "view")


SECRET = "store 'secret' \"of\" $(mine)"
"""What a user's own secret may hold; the file `env` is a script."""


def stack(verb: str, folder: Path, port: int, store_port: int) -> subprocess.CompletedProcess[str]:
    ports = ["--port", str(port), "--store-port", str(store_port), "--view-port", str(port + 1)]
    where = ["--dir", str(folder), *ports]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", 'umask 022; exec "$0" "$@"', str(ROOT / "infra" / "stack.sh"), verb, *where],
        env={**environment, "AWS_SECRET_ACCESS_KEY": SECRET},
        capture_output=True,
        text=True,
        check=False,
    )


def sourced(folder: Path) -> dict[str, str]:
    """What a shell has after `source env`."""
    script = f"source '{folder}/env'; env -0"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in found.stdout.split("\0") if line)


def status_of(url: str, password: str = "") -> int:
    """The HTTP status of a request for flows, by a client that has a password or none."""
    headers = {"Content-Type": "application/json"}
    if password:
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/flows/filter", b"{}", headers), timeout=30
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def umask_of(folder: Path, name: str) -> str:
    text = Path("/proc", (folder / f"{name}.pid").read_text().strip(), "status").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith("Umask:"))


def processes_of(folder: Path, shown: int = 100) -> list[str]:
    """Command lines of living processes whose command line or environment names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            text = line + (path / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in text and int(path.name) != os.getpid():
            found.append(line.decode(errors="replace")[:shown])
    return found


def test_up_and_down_are_idempotent_and_down_leaves_nothing(tmp_path: Path) -> None:
    folder, store_port = tmp_path / "stack", free_ports(7)
    port = store_port + 5
    try:
        done = stack("up", folder, port, store_port)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"ready: http://127.0.0.1:{port}" in done.stdout
        pids = {name: (folder / f"{name}.pid").read_text() for name in PROCESSES}
        assert f"PREFECT_API_URL=http://127.0.0.1:{port}/api" in (folder / "env").read_text()
        found = subprocess.run(
            ["bash", "-c", f"source '{folder}/env'; command -v prefect"], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == str(Path(sys.executable).with_name("prefect"))
        kept = sourced(folder)
        assert kept["AWS_SECRET_ACCESS_KEY"] == SECRET
        password = kept["PREFECT_API_AUTH_STRING"]
        assert len(password) > 30, "made at random"
        assert [status_of(kept["PREFECT_API_URL"], each) for each in ("", "admin:guess", password)] == [401, 401, 200]
        stranger = {**os.environ, "PYTHONPATH": PYTHONPATH, "PREFECT_API_URL": kept["PREFECT_API_URL"]}
        command = [sys.executable, "-m", "resmaster_flows.deploy"]
        done = subprocess.run(command, cwd=tmp_path, env=stranger, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "no Prefect server that can be used (401 Unauthorized)" in line
        assert line.endswith("PREFECT_API_KEY and PREFECT_API_AUTH_STRING")
        view = kept["RESMASTER_VIEW_URL"]
        assert view == f"http://127.0.0.1:{port + 1}/{kept['RESMASTER_VIEW_TOKEN']}/"
        with urllib.request.urlopen(view, timeout=30) as answer:
            assert answer.status == 200
        workers = Path("/proc", pids["shards"].strip(), "environ").read_bytes().split(b"\0")
        assert f"RESMASTER_VIEW_URL={view}".encode() in workers, "their runs link to it"
        assert umask_of(folder, "shards") == "0022", "runs write datasets as the user's umask says"
        assert (folder / "prefect/prefect.db").exists()
        assert modes(tmp_path) == {}, "nobody else reads passwords, logs, database and data"
        assert password not in "".join(processes_of(folder, 10_000)), "nor in the command line of a process"
        again = stack("up", folder, port, store_port)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"datasets: {view}" in again.stdout
        assert {name: (folder / f"{name}.pid").read_text() for name in PROCESSES} == pids
        assert sourced(folder) == kept, "whoever has sourced it goes on"
        assert stack("status", folder, port, store_port).returncode == 0
    finally:
        down = stack("down", folder, port, store_port)
    assert down.returncode == 0, down.stdout + down.stderr
    assert processes_of(folder) == []
    for taken in (port, store_port, port + 1):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", taken)) != 0
    assert stack("status", folder, port, store_port).returncode == 1
    assert stack("down", folder, port, store_port).returncode == 0
