"""Folders for sd-scripts and AI Toolkit, and what the trainer's buckets cut off."""

import tomllib
from pathlib import Path

import pytest
import yaml

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.publish.exports import kohya
from resmaster_stages.publish.exports.buckets import Bucket, bucketed, buckets, resolution_of
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.record import Options
from tests.publish.exports.common import built, image_of, key_of

HOSTILE = 'it\'s a "folder" \\ #1 [x] {y}: \u202egnp\u2028 ü\x7f\t\n'


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", tmp_path)


def toml(folder: Path) -> dict:
    return tomllib.loads((folder / "dataset.toml").read_text())


def test_sd_scripts_gets_images_captions_and_its_configuration(dataset: Dataset, tmp_path: Path) -> None:
    done = export(dataset, str(tmp_path / "x"), Options("kohya"))
    found = toml(tmp_path / "x")
    assert found["general"] == {
        "caption_extension": ".txt",
        "shuffle_caption": False,
        "enable_bucket": True,
        "bucket_no_upscale": True,
        "bucket_reso_steps": 64,
    }
    (section,) = found["datasets"]
    (subset,) = section.pop("subsets")
    assert section == {"resolution": 128, "min_bucket_reso": 64, "max_bucket_reso": 128, "batch_size": 1}
    images = Path(subset["image_dir"])
    assert images == tmp_path / "x" / "images"
    key = key_of(dataset, "a <b>cat</b>")
    assert (images / f"{key}.png").read_bytes() == image_of(dataset, "a <b>cat</b>")
    with (images / f"{key}.txt").open("rt", encoding="utf-8") as file:  # as sd-scripts reads it
        assert [line.strip() for line in file.readlines()] == ["a <b>cat</b>"]
    said = "bucket 64x64: 4 images, up to 32 px of the width and 0 px of the height are cut off"
    assert done.notes == (said,)
    assert f"# {said}\n" in (tmp_path / "x" / "dataset.toml").read_text()


def test_each_size_is_a_dataset_of_the_configuration(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset, str(tmp_path / "x"), Options("kohya", sizes=(None, 64)))
    whole, small = toml(tmp_path / "x")["datasets"]
    assert (whole["resolution"], small["resolution"]) == (128, 64)
    assert small["subsets"][0]["image_dir"] == str(tmp_path / "x" / "64" / "images")
    export(dataset, str(tmp_path / "y"), Options("ai-toolkit", sizes=(None, 64)))
    found = yaml.safe_load((tmp_path / "y" / "datasets.yaml").read_text())["datasets"]
    assert found[1] == {
        "folder_path": str(tmp_path / "y" / "64" / "images"),
        "caption_ext": "txt",
        "shuffle_tokens": False,
        "resolution": [64],
    }
    assert (tmp_path / "y" / "64" / "images" / f"{key_of(dataset, 'a boat')}.txt").read_text() == "a boat\n"


def test_any_name_of_a_folder_is_data(dataset: Dataset, tmp_path: Path) -> None:
    target = tmp_path / HOSTILE
    export(dataset, str(target), Options("kohya"))
    assert toml(target)["datasets"][0]["subsets"][0]["image_dir"] == str(target / "images")
    target = tmp_path / f"{HOSTILE} 2"
    export(dataset, str(target), Options("ai-toolkit"))
    (found,) = yaml.safe_load((target / "datasets.yaml").read_text())["datasets"]
    assert found["folder_path"] == str(target / "images")


@pytest.mark.parametrize(
    ("size", "resolution", "scaled", "bucket"),
    [
        ((4096, 4096), 1024, (1024, 1024), (1024, 1024)),
        ((1000, 1000), 1024, (1000, 1000), (960, 960)),  # smaller: not enlarged, but cut
        # 16:9 at 1024: sqrt(1024^2 16/9) = 1365.3 -> 1344 wide gives 756 -> 704 high (aspect 1.909); 768 high gives
        # 1365 -> 1344 wide (1.75), which is nearer to 1.778
        ((4096, 2304), 1024, (1365, 768), (1344, 768)),
        # 3:4 at 1024: sqrt(1024^2 3/4) = 886.8 -> 832 wide gives 1109 -> 1088 high (aspect 0.765); sqrt(1024^2 4/3) =
        # 1182.4 -> 1152 high gives 864 -> 832 wide (0.722), which is farther from 0.75
        ((3072, 4096), 1024, (832, 1109), (832, 1088)),
        ((1365, 768), 1024, (1365, 768), (1344, 768)),
        ((40, 900), 1024, (40, 900), (0, 896)),
    ],
)
def test_buckets_by_hand(
    size: tuple[int, int], resolution: int, scaled: tuple[int, int], bucket: tuple[int, int]
) -> None:
    found = bucketed(*size, resolution)
    assert (found.scaled, found.bucket) == (scaled, bucket)


def test_buckets_are_counted_with_what_is_cut_off() -> None:
    rows = [{"width": width, "height": 1024} for width in (1024, 1024, 1030, 1087, 1088, 20)]
    found = buckets(rows, 2048)
    assert found == [Bucket((0, 1024), 1, (20, 0)), Bucket((1024, 1024), 4, (63, 0)), Bucket((1088, 1024), 1, (0, 0))]
    assert [bucket.spelled() for bucket in found] == [
        "bucket 0x1024: 1 images, too small: a side has fewer than 64 px; leave them out",
        "bucket 1024x1024: 4 images, up to 63 px of the width and 0 px of the height are cut off",
        "bucket 1088x1024: 1 images, nothing is cut off",
    ]


@pytest.mark.parametrize(
    ("size", "sides", "wanted"),
    [(1024, (1365, 768), 1024), (1024, (700, 700), 1024), (None, (4096, 4096), 4096), (None, (1000, 1000), 1024)],
)
def test_the_resolution_scales_no_image_down(size: int | None, sides: tuple[int, int], wanted: int) -> None:
    assert resolution_of(size, [{"width": sides[0], "height": sides[1]}]) == wanted
    assert bucketed(*sides, wanted).scaled == sides


def test_many_buckets_are_told_in_the_file_alone(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kohya, "SHOWN_BUCKETS", 1)
    done = export(dataset, str(tmp_path / "x"), Options("kohya", sizes=(None, 64)))
    assert done.notes[1] == "2 more buckets are listed in dataset.toml"
    assert (tmp_path / "x" / "dataset.toml").read_text().count("# bucket ") == 3
