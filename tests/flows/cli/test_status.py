"""`resmaster status` of a root: what it prints, what it refuses, and its exit status."""

import json
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.dataset import layout
from tests.inspection.several import made, several


def out_of(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    found = capsys.readouterr()
    return found.out, found.err


def test_a_root_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    datasets = several(root, tmp_path)
    assert main(["status", str(root)]) == 0
    out, err = out_of(capsys)
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == f"{root}: 5 datasets"
    assert [line.split()[0] for line in lines[3:]] == ["damaged", "failing", "new", "half", "done"]
    assert (lines[4].split()[1:4], lines[4].split()[4:6]) == (["1", "shard", "failed"], ["66", "%"])
    assert err == ""

    assert main(["status", str(root), "--json"]) == 0
    found = json.loads(out_of(capsys)[0])
    assert [each["name"] for each in found["datasets"]] == ["damaged", "failing", "new", "half", "done"]
    assert found["datasets"][1]["failed_samples"] == 3
    assert found["datasets"][1]["url"] == datasets["failing"].url

    assert main(["status", str(root), "--openmetrics"]) == 0
    text = out_of(capsys)[0]
    for name in datasets:
        assert f'resmaster_dataset_readable{{dataset="{name}",root="{root}"}} 1.0' in text

    assert main(["status", str(root), "--list", "failed"]) == 2
    assert "name one" in out_of(capsys)[1]


def test_a_dataset_that_cannot_be_read_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    several(root, tmp_path)
    (root / "done" / layout.CONFIG).write_text("{")
    (root / "other").mkdir()
    (root / "other" / "file").write_text("x")
    for form in ([], ["--json"]):
        assert main(["status", str(root), *form]) == 1
        out, err = out_of(capsys)
        assert "failing" in out
        assert f"{root}/done/config.json: damaged" in err
        assert f"{root}/other: no dataset (no config.json)" in err
        assert "Traceback" not in err


def test_a_root_of_one_is_that_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = made(tmp_path / "out", tmp_path, "one", "ab")
    (tmp_path / "out" / "notes.txt").write_text("x")
    for place in (str(tmp_path / "out"), dataset.url):
        assert main(["status", place]) == 0
        assert out_of(capsys)[0].startswith(f"{dataset.url}: 1 shards, 2 samples")


def test_a_root_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ([], ["--json"], ["--openmetrics"], ["--list", "failed"]):
        assert main(["status", str(tmp_path), *form]) == 2
        assert "no dataset here (no config.json); make one with: resmaster run CONFIG" in out_of(capsys)[1]


def test_large_datasets_are_estimated_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmaster_stages.inspection.overview.RECORDS", 1)
    several(tmp_path / "out", tmp_path)
    assert main(["status", str(tmp_path / "out")]) == 0
    out = out_of(capsys)[0]
    assert out.rstrip().endswith(f"exact: resmaster status {tmp_path}/out/NAME")
    assert "~" in next(line for line in out.splitlines() if line.startswith("done"))
