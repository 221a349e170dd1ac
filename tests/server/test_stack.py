"""`make up` and `make down`: everything runs, once; then nothing does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import PYTHONPATH, ROOT
from tests.s3_server import free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(400)]

PROCESSES = ("server", "builds", "shards")


def stack(verb: str, folder: Path, port: int, store_port: int) -> subprocess.CompletedProcess[str]:
    where = ["--dir", str(folder), "--port", str(port), "--store-port", str(store_port)]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(ROOT / "infra" / "stack.sh"), verb, *where], env=environment, capture_output=True, text=True, check=False
    )


def processes_of(folder: Path) -> list[str]:
    """Living processes whose command line or environment names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in text and int(path.name) != os.getpid():
            found.append(text.decode(errors="replace")[:100])
    return found


def test_up_and_down_are_idempotent_and_down_leaves_nothing(tmp_path: Path) -> None:
    folder, store_port = tmp_path / "stack", free_ports(6)
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
        again = stack("up", folder, port, store_port)
        assert again.returncode == 0, again.stdout + again.stderr
        assert {name: (folder / f"{name}.pid").read_text() for name in PROCESSES} == pids
        assert stack("status", folder, port, store_port).returncode == 0
    finally:
        down = stack("down", folder, port, store_port)
    assert down.returncode == 0, down.stdout + down.stderr
    assert processes_of(folder) == []
    for taken in (port, store_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", taken)) != 0
    assert stack("status", folder, port, store_port).returncode == 1
    assert stack("down", folder, port, store_port).returncode == 0
