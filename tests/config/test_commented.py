"""What `resmaster init --base` writes: every key, explained from the schema, and with the value that counts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_flows.cli import init
from resmaster_flows.cli.main import main
from resmaster_stages.config.commented import commented
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.describe import part_in
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.config.part import Part
from resmaster_stages.planning.preview import preview

BASES = [Path(name).stem for name in init.CONFIGURATIONS]


def taken_into_use(text: str) -> str:
    """The text with the `# ` before every key removed."""
    return re.sub(r"^( *)# (?=(?:  )*(?:\w+:|##))", r"\1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("base", BASES)
def test_comments_change_nothing_and_say_what_counts(base: str) -> None:
    text = init.example(f"{base}.yaml")
    made = commented(text)
    assert yaml.safe_load(made) == yaml.safe_load(text)
    values = yaml.safe_load(taken_into_use(made))
    assert len(values) == len(DatasetConfig.model_fields)
    assert parse_config(values) == parse_config(yaml.safe_load(text)), "a comment has the value that counts"


def missing(part: type[Part], values: dict[str, Any], place: str = "") -> list[str]:
    """Keys of a part that the values lack."""
    found = []
    for name, field in part.model_fields.items():
        if name not in values:
            found.append(f"{place}{name}")
        elif (inner := part_in(field)) and isinstance(values[name], dict) and name != "upscale":
            found += missing(inner, values[name], f"{place}{name}.")
    return found


def test_every_key_is_there() -> None:
    text = "name: x\nprompts: p.txt\n"
    values = yaml.safe_load(taken_into_use(commented(text)))
    assert missing(DatasetConfig, values) == []
    assert missing(type(parse_config({"name": "x"}).upscale), values["upscale"]) == []


def test_meaning_choices_and_defaults_are_those_of_the_fields() -> None:
    made = commented("name: x\nprompts: p.txt\ncaptions:\n  grid: tiles\n")
    assert "  ## Patches per captioner call.\n  # batch_size: 16  # integer ≥ 1, ≤ 10000\n" in made
    assert "  # source: model  # model, server, attention, prompt\n" in made
    assert "\n## Base seed. The seeds of a sample are derived" in made
    assert all(len(line) <= 120 for line in made.splitlines() if "##" in line)


@pytest.mark.parametrize("base", BASES)
def test_init_writes_one_configuration(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "new", "--base", base]) == 0
    assert sorted(path.name for path in Path("new").iterdir()) == sorted(
        [f"{base}.yaml", "prompts.txt", "resmaster.schema.json"]
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"next: resmaster run new/{base}.yaml"
    lines = Path("new", f"{base}.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=resmaster.schema.json"
    assert load_config(f"new/{base}.yaml") == load_config(init.EXAMPLES / f"{base}.yaml").model_copy(
        update={"prompts": str(tmp_path / "new" / "prompts.txt")}
    )


def test_a_second_base_goes_beside_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path), "--base", "picturebook"]) == 0
    (tmp_path / "prompts.txt").write_text("mine")
    assert main(["init", str(tmp_path), "--base", "flux-4k"]) == 0
    assert (tmp_path / "prompts.txt").read_text() == "mine"
    assert main(["init", str(tmp_path), "--base", "flux-4k"]) == 2
    assert "flux-4k.yaml: is there already, and nothing was written" in capsys.readouterr().err


def test_own_images_and_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("my: photos").mkdir()
    Image.effect_noise((128, 128), 60).convert("RGB").save("my: photos/a.png")
    Path("mine.txt").write_text("a red house\n")
    assert main(["init", "one", "--base", "picturebook", "--images", "my: photos"]) == 0
    assert not Path("one/prompts.txt").exists()
    config = load_config("one/picturebook.yaml")
    assert (config.images, config.prompts) == (str(tmp_path / "my: photos"), None)
    assert preview(config).samples == 1
    assert main(["init", "two", "--base", "picturebook", "--prompts", "mine.txt"]) == 0
    assert preview(load_config("two/picturebook.yaml")).samples == 1
    assert main(["init", "three", "--base", "sdxl-4k", "--images", "s3://bucket/photos"]) == 0
    assert load_config("three/sdxl-4k.yaml").images == "s3://bucket/photos"
    for words, said in (
        (["--base", "sdxl-4k", "--images", "a", "--prompts", "b"], "--prompts and --images exclude each other"),
        (["--images", "a"], "--prompts and --images are for one configuration; name it with --base"),
        (["--base", "sdxl-4k", "--images", "s3://user:secret@b/x"], "--images: give a path or an s3:// URL without"),
        (["--base", "sdxl-4k", "--prompts", ""], "--prompts: give a path"),
    ):
        capsys.readouterr()
        assert main(["init", "four", *words]) == 2
        assert said in capsys.readouterr().err
        assert not Path("four").exists()
