import json
import os
from pathlib import Path

import pytest

from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset import dataset as dataset_module
from resmaster_stages.dataset.dataset import create_or_open, find_dataset, open_dataset
from resmaster_stages.dataset.sample import EncodedImage
from resmaster_stages.errors import ConfigError, SampleError, UserError
from tests.fake_stages import config_at, png


def test_create_then_open_by_folder_or_root(tmp_path: Path) -> None:
    made = create_or_open(config_at(tmp_path, limit=3))
    assert made.url == str(tmp_path / "demo")
    for url in (tmp_path, tmp_path / "demo"):
        assert open_dataset(str(url)) == made
    assert create_or_open(config_at(tmp_path, limit=3)) == made
    assert sorted(os.listdir(tmp_path / "demo")) == ["config.json"]


def test_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_or_open(config_at("out")).url == str(tmp_path / "out" / "demo")
    assert open_dataset("out").config.root == str(tmp_path / "out")


def test_a_moved_dataset_knows_its_new_root(tmp_path: Path) -> None:
    create_or_open(config_at(tmp_path / "a"))
    os.rename(tmp_path / "a", tmp_path / "b")
    assert open_dataset(str(tmp_path / "b")).config.root == str(tmp_path / "b")
    os.rename(tmp_path / "b" / "demo", tmp_path / "b" / "other")
    for url in (tmp_path / "b", tmp_path / "b" / "other"):
        renamed = open_dataset(str(url))
        assert (renamed.url, renamed.config.name) == (str(tmp_path / "b" / "other"), "demo")
    with pytest.raises(ConfigError, match="name is 'demo' there and 'other' in the configuration"):
        create_or_open(config_at(tmp_path / "b", name="other"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 5}, "seed is 0 there and 5"),
        ({"samples_per_shard": 9}, "samples_per_shard is 2 there and 9"),
        ({"low_res": {"height": 32, "width": 16}}, r"low_res\.height is 16 there and 32"),
        ({"images": "folder"}, "source is 'prompts' there and 'images'"),
    ],
)
def test_contradictions_name_key_and_values(tmp_path: Path, change: dict, name: str) -> None:
    create_or_open(config_at(tmp_path))
    with pytest.raises(ConfigError, match=f"{name}.* set it back, or choose another name or root"):
        create_or_open(config_at(tmp_path, **change))
    assert sorted(os.listdir(tmp_path / "demo")) == ["config.json"]


def test_stage_changes_are_appended_and_can_be_taken_back(tmp_path: Path) -> None:
    first, second = config_at(tmp_path), config_at(tmp_path, upscale={"steps": 7})
    create_or_open(first)
    assert create_or_open(second).config.upscale.steps == 7
    assert open_dataset(str(tmp_path)).config == second
    assert create_or_open(first).config == first
    assert open_dataset(str(tmp_path)).config == first
    create_or_open(first)
    assert sorted(os.listdir(tmp_path / "demo" / "configs")) == ["0001.json", "0002.json"]
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["upscale"]["steps"] == 25


def test_a_change_that_loses_the_race_takes_the_next_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_or_open(config_at(tmp_path))
    real, raced = dataset_module._current, []

    def slow(folder):
        found = real(folder)
        if not raced:
            raced.append(True)
            create_or_open(config_at(tmp_path, upscale={"steps": 8}))
        return found

    monkeypatch.setattr(dataset_module, "_current", slow)
    create_or_open(config_at(tmp_path, upscale={"steps": 9}))
    assert open_dataset(str(tmp_path)).config.upscale.steps == 9
    assert sorted(os.listdir(tmp_path / "demo" / "configs")) == ["0001.json", "0002.json"]


def test_no_or_several_datasets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset here"):
        open_dataset(str(tmp_path / "gone"))
    for name in ("one", "two"):
        create_or_open(config_at(tmp_path, name=name))
    with pytest.raises(ConfigError, match=r"several datasets here .one, two."):
        open_dataset(str(tmp_path))
    assert open_dataset(str(tmp_path / "two")).config.name == "two"


@pytest.mark.parametrize("text", ["", '{"name": "demo", "see', "[]", '{"name": "demo", "colour": 1}', "\xff"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    create_or_open(config_at(tmp_path))
    (tmp_path / "demo" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"demo/config\.json"):
        open_dataset(str(tmp_path))


def test_no_credentials_in_the_configuration(tmp_path: Path) -> None:
    captions = {"base_url": "http://me:secret@host/v1"}
    for values in ({"captions": captions}, {"prompts": "s3://key:secret@b/p.txt"}, {"root": "s3://key:se/cret@b"}):
        with pytest.raises(ConfigError, match="leave it out and set the environment") as refused:
            parse_config({"name": "demo", **values})
        assert "cret" not in str(refused.value)
    config = config_at(tmp_path)
    slipped = config.model_copy(update={"captions": config.captions.model_copy(update=captions)})  # not validated
    create_or_open(slipped)
    text = (tmp_path / "demo" / "config.json").read_text()
    assert "secret" not in text
    assert "http://host/v1" in text


def test_looking_for_a_dataset_writes_nothing(tmp_path: Path) -> None:
    assert find_dataset(config_at(tmp_path / "root")) is None
    assert os.listdir(tmp_path) == []
    made = create_or_open(config_at(tmp_path / "root"))
    assert find_dataset(config_at(tmp_path / "root", upscale={"steps": 7})) is not None
    assert open_dataset(made.url) == made
    with pytest.raises(ConfigError, match="seed is 0 there and 5"):
        find_dataset(config_at(tmp_path / "root", seed=5))


def test_roots_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        create_or_open(config_at(tmp_path / "file"))
    for error, message in (
        (FileNotFoundError("bkt"), "no such bucket"),
        (ConnectionError("refused"), "cannot be used"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(dataset_module.Folder, "create", fail)
        with pytest.raises(UserError, match=message):
            create_or_open(config_at(tmp_path))


def test_image_opens_or_fails_as_a_sample() -> None:
    assert EncodedImage(png((1, 2, 3)), "png", {"key": "k"}).open().getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(SampleError, match=r"^k: "):
        EncodedImage(b"x", "png", {"key": "k"}).open()
