"""What the Prefect UI gets to show of a build, on a real server, with stand-in stages."""

import base64
import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
)

from resmaster_flows.watch.artifacts import Publisher, Shown, key_of
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.storage.filesystem import open_root
from tests.fake_stages import config_at
from tests.flows.test_build import Stages, build_dataset, config_for, stages

__all__ = ["stages"]  # a fixture

pytestmark = pytest.mark.usefixtures("server")


def test_the_pages_of_a_build(stages: Stages, tmp_path: Path) -> None:
    config = config_for(tmp_path, ["a", "bad high_res", "c"]).model_copy(update={"name": "Shown_here"})
    result = build_dataset(config)
    keyed = key_of(open_dataset(result.dataset_url), "")
    assert keyed.startswith("shown-here-")
    with get_client(sync_client=True) as client:
        like = ArtifactFilter(key=ArtifactFilterKey(like_="shown-here-%"))
        found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=like)}
        assert set(found) == {
            f"{keyed}-{what}"
            for what in (
                "progress",
                "shards",
                "run-progress",
                "run-shards",
                "run-samples",
                "summary",
                "report",
                "contact-sheet",
            )
        }
        for kind in ("", "run-"):
            assert found[f"{keyed}-{kind}progress"].data == 100
            assert "2 of 3 images" in found[f"{keyed}-{kind}progress"].description
            rows = json.loads(found[f"{keyed}-{kind}shards"].data)
            assert [(row["shard"], row["state"], row["failed samples"]) for row in rows] == [
                ("000000", "finished", 1),
                ("000001", "finished", 0),
            ]
        page = found[f"{keyed}-summary"].data
        for part in (
            "# Shown\\_here",
            "| PSNR ↑ | 30.0 dB",
            "told to fail",
            f"`resmaster repair {result.dataset_url}`",
        ):
            assert part in page
        header, _, encoded = found[f"{keyed}-contact-sheet"].data.removesuffix(")").partition(",")
        assert header == "![contact sheet](data:image/webp;base64"
        samples = found[f"{keyed}-run-samples"].data
        assert samples.startswith("## 1 failed samples\n\n![low-res beside high-res](data:image/webp;base64,")
        assert ": bad high\\_res<br>**high\\_res: told to fail**\n\n## The first 2 samples of each shard\n\n" in samples
        assert samples.count("![low-res beside high-res](data:image/webp;base64,") == 3
        assert len(encoded) < 200_000
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).width > 400

        (parent,) = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["build Shown_here"]))
        )
        assert set(parent.tags) == {"dataset:Shown_here", "method:resmaster", "model:picturebook"}
        runs = {parent.id, found[f"{keyed}-run-progress"].flow_run_id}
        assert {artifact.flow_run_id for artifact in found.values()} == runs
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(runs))))
        assert tasks
        assert not any(task.tags for task in tasks), "a tag costs every task run a second"


def test_artifacts_are_changed_in_place_and_sent_only_when_they_changed(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("create_artifact", "update_artifact"):
        original = getattr(SyncPrefectClient, name)

        def counted(self: SyncPrefectClient, *args: object, _name=name, _original=original) -> object:
            calls.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(SyncPrefectClient, name, counted)

    @flow
    def watched() -> None:
        steps = [0, 0, 1, 1, 2]
        artifacts = Publisher(lambda: [Shown("watched", "progress", steps.pop(0) if steps else 2)], interval=0.01)
        with artifacts:
            while steps:
                time.sleep(0.05)

    watched()
    assert calls == ["create_artifact", "update_artifact", "update_artifact"]


def test_a_page_that_cannot_be_drawn_does_not_fail_the_build_and_is_logged(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no artifacts today")

    for name in ("create_artifact", "update_flow_run"):
        monkeypatch.setattr(SyncPrefectClient, name, refuse)
    result = build_dataset(config_for(tmp_path, ["a", "b", "c"]))
    assert (result.samples, result.errors) == (3, {})
    lines = [record.getMessage() for record in caplog.records if "artifacts:" in record.getMessage()]
    keyed = key_of(open_dataset(result.dataset_url), "")
    for what in (f"{keyed}-progress", f"{keyed}-run-shards", f"{keyed}-summary", "tags"):
        assert any(f"artifacts: {what} cannot be shown: RuntimeError: no artifacts today" in line for line in lines), (
            what
        )


def test_a_server_that_hangs_does_not_hold_the_build_for_long(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = threading.Event()
    monkeypatch.setattr("resmaster_flows.watch.artifacts.CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(SyncPrefectClient, "create_artifact", lambda *args: answer.wait())
    try:
        assert build_dataset(config_for(tmp_path, ["a"])).samples == 1
    finally:
        answer.set()
    assert any("the server does not answer" in record.getMessage() for record in caplog.records)


def test_artifacts_of_different_datasets_have_different_keys(tmp_path: Path) -> None:
    """An artifact of one key is a version of the other, so one dataset's page would show another's."""
    names = ("a_b", "a-b", "A-B", "a__b", "_", "__", "-", "a")
    places = [(root, name) for root in (tmp_path / "one", tmp_path / "two") for name in names]
    keys = []
    for root, name in places:
        config = config_at(root).model_copy(update={"name": name})
        dataset = Dataset(open_root(str(root)).sub(name), config)
        keys.append(key_of(dataset, "progress"))
        assert key_of(dataset, "progress") == keys[-1]
    assert len(set(keys)) == len(places)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", key) for key in keys), "Prefect's rule"
