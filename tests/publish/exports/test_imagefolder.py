"""Hugging Face's datasets reads format `imagefolder`."""

import json
from pathlib import Path

import pytest

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.record import Options
from tests.publish.exports.common import NAMES, WIDE, built, choose

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (extra dev)")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", tmp_path)


def loaded(folder: Path, cache: Path):
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))


def test_datasets_reads_it_back(dataset: Dataset, tmp_path: Path) -> None:
    choose(dataset, "a house", "kept", 5)
    export(dataset, str(tmp_path / "x"), Options("imagefolder"))
    found = loaded(tmp_path / "x", tmp_path / "cache")
    assert [row["prompt"] for row in found] == NAMES == found["text"][:]
    assert [row["image"].size for row in found] == [(96, 64) if name == WIDE else (64, 64) for name in NAMES]
    assert found["agreement_psnr"][:] == [30.0] * 4
    assert (found[0]["verdict"], found[0]["rating"], found[1]["rating"]) == ("kept", 5, None)
    assert "clip_score" not in found.column_names, "it has no value at all"


def test_each_size_is_a_dataset_of_its_own(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset, str(tmp_path / "x"), Options("imagefolder", sizes=(None, 32)))
    for name, size in (("full", (64, 64)), ("32", (32, 32))):
        found = loaded(tmp_path / "x" / name, tmp_path / "cache")
        assert len(found) == 4
        assert (found[0]["image"].size, found[0]["width"]) == (size, size[0])


def test_a_value_that_comes_late_has_its_type(dataset: Dataset, tmp_path: Path) -> None:
    """The first rows have no rating. Readers guess a column's type from the rows that come first."""
    choose(dataset, NAMES[-1], "none", 3)
    export(dataset, str(tmp_path / "x"), Options("imagefolder"))
    path = tmp_path / "x" / "metadata.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["rating"] for line in lines] == [None, None, None, 3]
    assert loaded(tmp_path / "x", tmp_path / "cache")["rating"][:] == [None, None, None, 3]
