"""An empty folder on each kind of store."""

import uuid
from pathlib import Path

import pytest

from resmaster_stages.storage.filesystem import Folder, open_root


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return open_root(request.getfixturevalue("s3_root"))
    return open_root(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")
