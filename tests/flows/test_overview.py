"""The flow `overview` on a real server: a table artifact over all datasets of a root."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from resmaster_flows.overview import KEY, overview_of
from resmaster_stages.dataset import layout
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.overview import HEADINGS
from tests.inspection.several import made, several


def artifacts() -> list[Any]:
    named = ArtifactFilter(key=ArtifactFilterKey(any_=[KEY]))
    with get_client(sync_client=True) as client:
        return sorted(client.read_artifacts(artifact_filter=named), key=lambda each: each.created)


def test_the_table(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    several(root, tmp_path)
    made(root, tmp_path, "lost", "ab")
    (root / "lost" / layout.CONFIG).write_text("{")
    assert overview_of(str(root)) == 3, "failing, damaged, lost"
    (artifact,) = artifacts()
    rows = json.loads(artifact.data)
    assert [row["dataset"] for row in rows] == ["lost", "damaged", "failing", "new", "half", "done"]
    assert all(list(row) == list(HEADINGS) for row in rows)
    assert (rows[0]["attention"], rows[1]["attention"]) == ("cannot be read", "1 commit damaged")
    assert "lost/config.json: damaged" in artifact.description
    assert (artifact.type, artifact.flow_run_id is not None) == ("table", True)

    monkeypatch.setenv("RESMASTER_ROOT", str(root))
    assert overview_of() == 3
    assert len(artifacts()) == 2, "the versions are the history"


def test_what_is_no_root(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made(tmp_path / "out", tmp_path, "one", "ab")
    with pytest.raises(UserError, match=f"is one dataset; give the root above it: {tmp_path}/out"):
        overview_of(dataset.url)
    monkeypatch.delenv("RESMASTER_ROOT", raising=False)
    with pytest.raises(UserError, match="deploy with RESMASTER_ROOT"):
        overview_of()
