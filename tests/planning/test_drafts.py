"""What could not be stored in the end is turned down before anything is computed."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.schemas import DUPLICATES_SCHEMA, REJECTED_SCHEMA
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.keys import prompt_key
from resmaster_stages.planning import drafts
from resmaster_stages.planning.checks import check_sizes
from resmaster_stages.planning.drafts import KEPT_INPUTS, DraftReader, draft_samples
from resmaster_stages.planning.preview import preview
from resmaster_stages.planning.prompt_files import read_prompts
from resmaster_stages.prompts import ingest
from resmaster_stages.storage.images import encode_image
from resmaster_stages.storage.tables import decode_table


def config_of(root: Path, **changes: Any) -> DatasetConfig:
    return parse_config({"name": "sizes", "root": str(root), "model": {"id": "picturebook"}, **changes})


def test_images_too_large_for_the_format_are_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for height in (4095, 4096, 16384):
        Image.new("RGB", (1, height)).save(folder / f"{height}.png")
    draft = draft_samples(config_of(tmp_path, images=str(folder)))
    assert [sample.height for sample in draft.samples] == [4095]
    assert [(Path(each.source).name, each.reason) for each in draft.rejected] == [
        ("16384.png", "WebP holds at most 16383 px a side, this is 1x16384; set image_format: png"),
        (
            "4096.png",
            "its high-res image: WebP holds at most 16383 px a side, this is 4x16384; set image_format: png",
        ),
    ]
    assert len(draft_samples(config_of(tmp_path, images=str(folder), image_format="png")).samples) == 3


def test_images_that_could_not_be_read_again_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for side in (10, 11):
        Image.new("RGB", (side, side)).save(folder / f"{side}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    draft = draft_samples(config_of(tmp_path, images=str(folder)))
    assert [sample.height for sample in draft.samples] == [10]
    (rejected,) = draft.rejected
    assert rejected.reason.startswith("its high-res image: 44x44 px are too many pixels (more than 1,600); enlarge it")
    with pytest.raises(SampleError, match="41x40 px are too many pixels"):
        encode_image(Image.new("RGB", (41, 40)), "png")


def test_sizes_of_generated_images_too_large_for_the_format(tmp_path: Path) -> None:
    prompts, large = str(tmp_path / "p.txt"), {"height": 4096}
    assert check_sizes(config_of(tmp_path, prompts=prompts, low_res=large, image_format="png")) == (4096, 128)
    for low_res, image_format in ((large, "webp"), ({"height": 4096, "width": 4096}, "png")):
        with pytest.raises(ConfigError, match=r"^low_res and upscale.scale: its high-res image: "):
            check_sizes(config_of(tmp_path, prompts=prompts, low_res=low_res, image_format=image_format))


def test_replicas_beyond_any_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replicas: Input should be less than or equal to 100000"):
        config_of(tmp_path, prompts="p.txt", replicas=10**18)


def test_replicas_are_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a house\na tree\n")
    made = []

    def key(*args: Any) -> str:
        made.append(args)
        return prompt_key(*args)

    monkeypatch.setattr("resmaster_stages.planning.drafts.prompt_key", key)
    samples = iter(DraftReader(config_of(tmp_path, prompts=str(tmp_path / "p.txt"), replicas=100_000)))
    assert [next(samples).replica for _ in range(3)] == [0, 1, 2]
    assert len(made) == 3, "no more are held than were asked for"


def test_prompts_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("".join(f"house {number}\n" for number in range(50_000)))
    read = []

    def noted(path: str) -> Any:
        for raw in read_prompts(path):
            read.append(raw)
            yield raw

    monkeypatch.setattr("resmaster_stages.planning.drafts.read_prompts", noted)
    samples = iter(DraftReader(config_of(tmp_path, prompts=str(tmp_path / "p.txt"))))
    for _ in range(10):
        next(samples)
    assert len(read) == 10, "rows are held one at a time"


def test_inputs_that_are_left_out_are_listed_whole_and_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, bad = 3_000, 2_500
    (tmp_path / "p.txt").write_text("a house\n" * (1 + again) + "a \x07 bell\n" * bad)
    config = config_of(tmp_path / "out", prompts=str(tmp_path / "p.txt"))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def watched(kind: type) -> Any:
        watchable: Any = type(kind.__name__, (kind,), {})  # a class with slots has no weak references

        def make(*args: Any) -> Any:
            nonlocal most
            made = watchable(*args)
            alive.add(made)
            most = max(most, len(alive))
            return made

        return make

    monkeypatch.setattr(drafts, "Duplicate", watched(drafts.Duplicate))
    monkeypatch.setattr(drafts, "Rejected", watched(drafts.Rejected))
    look = preview(config)
    assert (look.duplicates.count, look.rejected.count) == (again, bad)
    assert len(look.duplicates.first) == len(look.rejected.first) == KEPT_INPUTS
    assert "3000 duplicates left out; 2500 rejected" in look.headline()
    dataset = ingest(config)
    (generation,) = dataset.plan.generations
    assert (generation.duplicates_count, generation.rejected_count) == (again, bad)
    assert generation.duplicates
    assert generation.rejected
    for stored, schema, count in (
        (generation.duplicates, DUPLICATES_SCHEMA, again),
        (generation.rejected, REJECTED_SCHEMA, bad),
    ):
        rows = decode_table(dataset.folder.read(stored.name), schema, stored.name).to_pylist()
        assert len({row["source"] for row in rows}) == len(rows) == count
    assert most < 4 * KEPT_INPUTS
