"""`--set key=value`: any key of a configuration, on every verb that reads one."""

from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.config.load import load_config, parse_setting
from resmaster_stages.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "c.yaml"
    path.write_text("name: x\nprompts: p.txt\nseed: 4\nupscale:\n  steps: 30\n  structure: {cutoff: 0.5}\n")
    (tmp_path / "sub" / "p.txt").write_text("a red house\n")
    return path


def test_values_are_yaml_and_the_last_one_counts(file: Path) -> None:
    config = load_config(
        file,
        settings=[
            *("upscale.steps=10", "upscale.steps=20", "upscale.structure.stop=0.9", "upscale.via=[2]"),
            *("captions.style=oil = painting", "quality.clip=null", "model.ip_adapter.id=h94/IP-Adapter"),
            *("model.ip_adapter.weight_name=w.safetensors", "recaption.styles={short: Describe it.}", "limit=3"),
        ],
        limit=5,
    )
    upscale = config.upscale.model_dump()
    assert (upscale["steps"], upscale["via"]) == (20, (2.0,))
    assert (upscale["structure"]["cutoff"], upscale["structure"]["stop"]) == (0.5, 0.9), "the file's other keys stay"
    assert config.captions.style == "oil = painting"
    assert config.quality.clip is None
    assert config.model.ip_adapter is not None
    assert config.model.ip_adapter.id == "h94/IP-Adapter"
    assert config.recaption.styles == {"short": "Describe it."}
    assert config.limit == 3, "more than an option"
    assert config.seed == 4


def test_a_set_key_is_as_if_it_stood_in_the_file(file: Path, tmp_path: Path) -> None:
    written = tmp_path / "sub" / "d.yaml"
    written.write_text(file.read_text().replace("steps: 30", "steps: 20"))
    set_ = load_config(file, settings=["upscale.steps=20"])
    assert set_ == load_config(written)
    assert set_.upscale.identity() == load_config(written).upscale.identity()


def test_another_method_keeps_what_both_have(file: Path) -> None:
    config = load_config(file, settings=["upscale.cosine_scale_1=2.5", "upscale.method=demofusion"])
    values = config.upscale.model_dump()
    assert (values["method"], values["steps"], values["cosine_scale_1"]) == ("demofusion", 30, 2.5)


def test_paths_are_of_the_current_folder(file: Path, tmp_path: Path) -> None:
    assert load_config(file, settings=["prompts=mine.txt"]).prompts == str(tmp_path / "mine.txt")
    config = load_config(file, settings=["images=photos"])
    assert (config.images, config.prompts) == (str(tmp_path / "photos"), None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("upscale.steps", "--set upscale.steps: write KEY=VALUE"),
        ("=3", "--set =3: write KEY=VALUE"),
        ("upscale..steps=3", "--set upscale..steps=3: write KEY=VALUE"),
        ("upscale.steps=many", "--set upscale.steps=many: upscale.steps: Input should be a valid integer"),
        ("upscale.step=3", "--set upscale.step=3: unknown key 'upscale.step' (did you mean 'steps'?)"),
        ("upscal.steps=3", "--set upscal.steps=3: unknown key 'upscal' (did you mean 'upscale'?)"),
        (
            "upscale.structure.cutof=3",
            "--set upscale.structure.cutof=3: unknown key 'upscale.structure.cutof' (did you mean 'cutoff'?)",
        ),
        ("upscale.method=resmastr", "unknown method 'resmastr' (did you mean 'resmaster'?)"),
        ("upscale.preset=faithfull", "unknown preset 'faithfull' (did you mean 'faithful'?)"),
        (
            "captions.grid=view",
            "--set captions.grid=view: captions.grid: Input should be 'views' or 'tiles' (did you mean",
        ),
        ("upscale.steps.x=3", "--set upscale.steps.x=3: upscale.steps is no part with keys of its own"),
        ("upscale.via=[2", "--set upscale.via=[2: not valid YAML"),
        ("seed=-1", "--set seed=-1: seed: Input should be greater than or equal to 0"),
        ("name=a/b", "--set name=a/b: name: use letters"),
        ("root=s3://user:secretpassword@host/x", "root: holds a user, password"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run", "compare", "upscale"])
def test_a_mistake_names_the_option(
    verb: str, setting: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"upscale": ["a.png", "b.png", "--config", str(file)], "compare": [str(file), "--methods", "lanczos"]}
    assert main([verb, *words.get(verb, [str(file)]), "--set", setting]) == 2
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert said in line
    assert "secretpassword" not in line
    assert not Path("out").exists()


def test_a_mistake_of_the_file_stays_the_files(file: Path) -> None:
    file.write_text("name: x\nupscale: {stepz: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, settings=["upscale.steps=x", "seed=1"])
    assert caught.value.mistakes[1].startswith(f"{file}: line 2: unknown key 'upscale.stepz'")
    assert caught.value.mistakes[0].startswith("--set upscale.steps=x: upscale.steps:")


def test_long_and_odd_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_setting("x" * 100_000)
    assert len(str(caught.value)) < 400
    for text in ("a=\0", "a=&a [*a, *a]", "a=!!python/object:os.system x", "a=" + "[" * 5_000, "a=1" + "0" * 5_000):
        with pytest.raises(ConfigError, match=r"^--set a=.*(not valid YAML|its aliases stand for)"):
            parse_setting(text)


def test_upscale_reads_settings_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "navy").save("a.png")
    words = ["--model", "picturebook", "--method", "multidiffusion", "--scale", "1"]
    assert main(["upscale", "a.png", "b.png", *words, "--set", "upscale.steps=2", "--set", "image_metadata=none"]) == 0
    assert "step 2 of 2" in capsys.readouterr().err
    assert Image.open("b.png").info == {}


def test_a_plan_is_made_of_what_is_set(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--set", "replicas=3", "--set", "samples_per_shard=1"]) == 0
    assert "3 samples in 3 shards" in capsys.readouterr().out
