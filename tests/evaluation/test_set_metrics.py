"""Features kept by the quality stage: committed beside the table, reproducible, and enough for FID and KID of any
subset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.reading import committed_arrays, shard_samples
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import PlanError, SampleError, ShardError
from resmaster_stages.evaluation import set_metrics
from resmaster_stages.evaluation.set_metrics import compare_sets, feature_statistics, read_features, stacked
from resmaster_stages.metrics.crops import crop_boxes, crops
from resmaster_stages.metrics.features import Features, image_features
from resmaster_stages.metrics.fid import FeatureStatistics, frechet_distance
from resmaster_stages.metrics.kid import kid
from resmaster_stages.metrics.resize import resize
from resmaster_stages.models.identity import Weights
from resmaster_stages.runner.run import run_stage
from tests import fake_stages
from tests.fake_stages import FAKES, planned


class Means:
    """Mean colour and contrast: features that can be computed by hand."""

    name, input_px, dimension = "means", 8, 6

    def __init__(self) -> None:
        self.seen = 0

    def extract(self, images: Sequence[Image.Image]) -> Features:
        self.seen += len(images)
        small = [resize(image, 8, 8) / 255 for image in images]
        rows = [np.concatenate([values.mean(axis=(0, 1)), values.std(axis=(0, 1))]) for values in small]
        p = np.array([[row[0] + 0.1, 1.1 - row[0]] for row in rows]) / 1.2
        return Features(np.array(rows, np.float32), p.astype(np.float32))


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def with_features(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """The stand-in quality stage with the real stage's features."""
    for sample, output in zip(samples, fake_stages.quality(config, samples)):
        if "bad quality" in sample.prompt:
            yield Output(sample.key, error=SampleError("told to fail"))
            continue
        assert sample.high_res
        found = image_features(Means(), sample.high_res.open(), sample.key, 16)
        yield Output(sample.key, rows=output.rows, arrays={f"high_res.{view}": a for view, a in found.items()})


def build(root: Path, folder: Path, prompts: list[str]) -> tuple[Dataset, list[Receipt]]:
    dataset = planned(root, prompts, folder, quality={"features": "clip"})
    receipts = []
    for shard in range(read_plan(dataset.folder).shards):
        for stage, process in {**FAKES, "quality": with_features}.items():
            receipts.append(run_stage(dataset, stage, shard, process=process))  # type: ignore[arg-type]
    return dataset, receipts


def some_image(seed: int, size: int = 48) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3))
    return Image.fromarray(values.astype(np.uint8))


def test_a_images_features_are_those_of_its_crops() -> None:
    extractor, image, key = Means(), some_image(1), "0f" * 12
    found = image_features(extractor, image, key, 16)
    assert {name: values.shape for name, values in found.items()} == {
        "r": (6,),
        "c": (10, 6),
        "u": (10, 6),
        "r.probabilities": (2,),
        "c.probabilities": (10, 2),
        "u.probabilities": (10, 2),
    }
    assert {values.dtype.name for values in found.values()} == {"float16"}
    for view, size in (("c", 16), ("u", 8)):
        expected = Means().extract(crops(image, crop_boxes(key, 48, 48, size))).features
        assert np.abs(found[view] - expected).max() < 1e-3
    assert np.abs(found["r"] - Means().extract([image]).features[0]).max() < 1e-3


def test_equal_crops_are_looked_at_once_and_large_features_are_an_error() -> None:
    extractor = Means()
    small = image_features(extractor, some_image(1, size=8), "aa", 16)
    assert extractor.seen == 2, "the image, and the one crop that it has room for"
    assert (small["c"] == small["c"][0]).all()

    class Huge(Means):
        def extract(self, images: Sequence[Image.Image]) -> Features:
            return Features(np.full((len(images), 6), 1e6, np.float32))

    with pytest.raises(SampleError, match="half precision"):
        image_features(Huge(), some_image(1), "aa", 16)


def test_features_are_a_second_object_of_the_commit_with_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        dataset, receipts = build(tmp_path / name, tmp_path, ["a", "bad quality", "c"])
        quality = [receipt for receipt in receipts if receipt.stage == "quality"]
        assert [len(receipt.objects) for receipt in receipts] == [1, 1, 1, 2, 1, 1, 1, 2]
        assert all(receipt.objects[1].name.endswith(".features.parquet") for receipt in quality)
        contents.append([dataset.folder.read(stored.name) for receipt in quality for stored in receipt.objects])
        with shard_samples(dataset, 0, ["quality"]) as samples:
            assert list(committed_arrays(dataset, quality[0])) == samples.keys()
        assert committed_arrays(dataset, receipts[0]) == {}
    assert contents[0] == contents[1]


def test_a_shard_without_survivors_and_damaged_features(tmp_path: Path) -> None:
    dataset, receipts = build(tmp_path / "a", tmp_path, ["bad low_res"])
    assert len(receipts[-1].objects) == 1
    assert read_features(dataset) == {}
    dataset, receipts = build(tmp_path / "b", tmp_path, ["a"])
    stored = receipts[-1].objects[1]
    path = Path(dataset.folder.url_of(stored.name))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match=rf"{stored.name} is damaged .* resmaster verify .* resmaster repair"):
        read_features(dataset)


def test_a_stage_that_forgets_an_array_commits_nothing(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a", "b"], tmp_path)

    def forgetful(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for place, output in enumerate(FAKES["low_res"](config, samples)):
            yield Output(output.key, files=output.files, arrays={"r": np.zeros(2, np.float16)} if place else {})

    with pytest.raises(ValueError, match="has arrays"):
        run_stage(dataset, "low_res", 0, process=forgetful)
    assert dataset.folder.names("low_res") == []


def test_sets_are_compared_without_images(tmp_path: Path) -> None:
    dataset, _ = build(tmp_path / "a", tmp_path, [f"p{i}" for i in range(6)])
    other, _ = build(tmp_path / "b", tmp_path, [f"q{i}" for i in range(5)])
    for path in (tmp_path / "a").rglob("*.tar"):
        path.unlink()
    features = read_features(open_dataset(dataset.url))
    assert len(features) == 6
    found, reference = stacked(features), stacked(read_features(other))
    row = compare_sets(found, reference)
    streamed = [feature_statistics(each, "c") for each in (dataset, other)]
    assert (streamed[0].n, streamed[1].n) == (60, 50)
    assert frechet_distance(*streamed) == pytest.approx(row["fid_c"], rel=1e-9)
    assert feature_statistics(dataset, "r", keys=list(features)[1:4]).n == 3
    with pytest.raises(PlanError, match="no features of these samples"):
        feature_statistics(dataset, "r", keys=["zz"])
    assert row["fid_r"] == pytest.approx(
        frechet_distance(FeatureStatistics.of(found["r"]), FeatureStatistics.of(reference["r"]))
    )
    assert row["kid_c"] == kid(found["c"], reference["c"]).value
    assert row["kid_c_low"] is not None
    assert row["kid_c_high"] is not None
    assert row["kid_c_low"] < row["kid_c"] < row["kid_c_high"]
    assert 1 <= (row["is_r"] or 0) <= 2
    half = list(features)[:2]
    assert stacked(features, half)["c"].shape == (2, 10, 6)
    few: dict[str, Any] = compare_sets(stacked(features, half[:1]), reference)
    assert few["fid_r"] is few["kid_r"] is None
    with pytest.raises(PlanError, match="1 samples have no features, zz first"):
        stacked(features, ["zz"])


def test_a_dataset_without_features_says_how_to_get_them(tmp_path: Path) -> None:
    dataset = planned(tmp_path, ["a"], tmp_path)
    with pytest.raises(PlanError, match=r"quality\.features: clip"):
        set_metrics.read_features(dataset)


def test_the_card_names_the_features(tmp_path: Path) -> None:
    from resmaster_stages.publish.manifest import write_manifest

    dataset, _ = build(tmp_path, tmp_path, ["a"])
    write_manifest(dataset)
    assert "| `quality/*.features.parquet` | feature vectors (clip)" in dataset.folder.read("README.md").decode()
