"""`resmaster init`: something to start from, and nothing overwritten."""

import os
from pathlib import Path

import pytest

from resmaster_flows.cli import init
from resmaster_flows.cli.main import main
from resmaster_flows.home import EXAMPLES
from resmaster_stages.config.load import load_config
from resmaster_stages.planning.preview import preview

FILES = [
    "flux-4k.yaml",
    "picturebook.yaml",
    "pixart-4k.yaml",
    "prompts.txt",
    "qwen-4k.yaml",
    "resmaster.schema.json",
    "sd35-4k.yaml",
    "sdxl-2k.yaml",
    "sdxl-4k.yaml",
    "sdxl-controlnet-4k.yaml",
    "sdxl-few-step-4k.yaml",
    "z-image-4k.yaml",
]


def test_what_it_writes_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my demo"]) == 0
    assert sorted(os.listdir("my demo")) == FILES
    assert capsys.readouterr().err.splitlines()[-1] == "next: resmaster run 'my demo/picturebook.yaml'"
    for name in init.CONFIGURATIONS:
        config = load_config(Path("my demo", name))
        assert config.prompts == str(tmp_path / "my demo" / "prompts.txt")
        example = load_config(EXAMPLES / name)
        assert config == example.model_copy(update={"prompts": config.prompts}), "the example, but for its prompts"
    assert preview(load_config(Path("my demo/picturebook.yaml"))).samples == 16


def test_the_folder_is_this_one_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert sorted(os.listdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("link", [False, True], ids=["file", "link to nothing"])
def test_nothing_is_overwritten(name: str, link: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if link:
        (tmp_path / name).symlink_to(tmp_path / "gone")
    else:
        (tmp_path / name).write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"resmaster: {tmp_path / name}: is there already, and nothing was written; give another folder\n"
    )
    assert os.listdir(tmp_path) == [name]
    assert link or (tmp_path / name).read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below"):
        assert main(["init", str(tmp_path / folder)]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
