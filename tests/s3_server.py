"""A real S3 server for tests (SeaweedFS through infra/seaweedfs.sh): on free ports, in a folder of its own.

The fixtures `s3_server` (one for the whole session) and `s3_root` (a fresh prefix, with the environment set) are in
conftest.py.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import s3fs
from tests.checkout import ROOT

SCRIPT = ROOT / "infra" / "seaweedfs.sh"
BUCKET = "tests"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class S3Server:
    """A server that answers."""

    endpoint: str
    key: str = "test"
    secret: str = "test-secret"
    bucket: str = BUCKET

    @property
    def environment(self) -> dict[str, str]:
        """What makes every S3 client, in this process or another, talk to it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self) -> s3fs.S3FileSystem:
        """A client that sees other processes' objects at once."""
        import s3fs

        return s3fs.S3FileSystem(
            key=self.key,
            secret=self.secret,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )


def weed() -> Path | None:
    """The server's program beside this Python; None where its package has no wheel."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return Path(found) if found else None


def free_ports(count: int, spacing: int = 10_000) -> int:
    """The first of `count` ports in a row that are free, as are those `spacing` above."""
    for _ in range(200):
        first = random.randrange(10_050, 22_000)
        ports = [first + number for number in range(count)]
        if all(_is_free(port) for port in [*ports, *(port + spacing for port in ports)]):
            return first
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def die_with_parent() -> None:
    """No server outlives the tests, even if they are killed (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def serving(folder: Path) -> Iterator[S3Server]:
    """A server with its data in `folder`, until the block ends."""
    for _ in range(3):  # another program may take a port between the look and the start
        port = free_ports(5)
        server = S3Server(f"http://127.0.0.1:{port}")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(SCRIPT), "run", "--dir", str(folder / "data"), "--port", str(port), "--bucket", ""],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **server.environment, "WEED": str(weed())},
                preexec_fn=die_with_parent,
            )
        try:
            if _make_bucket(server, process):
                yield server
                return
        finally:
            process.kill()
            process.wait()
    raise RuntimeError(f"the S3 server did not start:\n{(folder / 'log').read_text()}")


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers, and make the bucket, if the folder does not have it from an earlier server. False
    if it ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        try:
            server.filesystem().call_s3("create_bucket", Bucket=server.bucket)
            return True
        except FileExistsError:
            return True
        except Exception:  # each client library has its own way to say "not yet"
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    return False
