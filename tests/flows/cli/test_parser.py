"""A mistyped word is answered with the word that it may have meant; `--version`."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image

import resmaster_stages
from resmaster_flows.cli.main import main
from tests.checkout import ROOT


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and last line of a command that ends in its parser."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    return ended.value.code, (out + err).splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hlep"], "unknown option --hlep (did you mean '--help'?); see: resmaster --help"),
        (["--verson"], "unknown option --verson (did you mean '--version'?)"),
        (["statu", "out"], "invalid choice: 'statu' (did you mean 'status'?); choose from init, run, plan"),
        (["upscale", "--hlep"], "unknown option --hlep (did you mean '--help'?); see: resmaster upscale --help"),
        (["upscale", "a.png", "b.png", "--presett", "x"], "unknown option --presett (did you mean '--preset'?)"),
        (["upscale", "a.png", "b.png", "--presett=x"], "unknown option --presett (did you mean '--preset'?)"),
        (["run", "c.yaml", "--limmit", "3"], "unknown option --limmit (did you mean '--limit'?)"),
        (["run", "c.yaml", "--executor", "dsk"], "invalid choice: 'dsk' (did you mean 'dask'?); choose from dask, ray"),
        (["upscale", "a.png", "b.png", "--output-format", "jpg"], "invalid choice: 'jpg' (did you mean 'jpeg'?)"),
        (["export", "x", "y", "--as", "imagfolder"], "invalid choice: 'imagfolder' (did you mean 'imagefolder'?)"),
        (["status", "out", "--list", "faild"], "invalid choice: 'faild' (did you mean 'failed'?)"),
        (["init", "x", "--base", "sdxl4k"], "invalid choice: 'sdxl4k' (did you mean 'sdxl-4k'?)"),
        (["run", "c.yaml", "--xyzzy"], "unknown option --xyzzy; see: resmaster run --help"),
        (["xyzzy"], "invalid choice: 'xyzzy'; choose from init, run"),
    ],
    ids=" ".join,
)
def test_a_mistyped_word(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = answer(capsys, *words)
    assert status == 2
    assert said in line


@pytest.mark.parametrize(
    "words",
    [
        ["upscale", "absent.png", "b.png", "--method", "lanczos", "--prompt", "--a house"],  # a space: a value
        ["upscale", "absent.png", "b.png", "--method", "lanczos", "--prompt=--x"],
        ["upscale", "--meth", "lanczos", "--", "absent.png", "b.png"],  # a beginning, as argparse takes it
        ["upscale", "--method", "lanczos", "--", "--absent.png", "b.png"],
    ],
    ids=" ".join,
)
def test_what_is_no_mistake_is_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "absent.png: no such image file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "resmastr"], "unknown method 'resmastr' (did you mean 'resmaster'?); known: direct"),
        (["--preset", "faithfull"], "unknown preset 'faithfull' (did you mean 'faithful'?); known: default"),
        (["--set", "upscale.structure.presett=paper"], "key 'upscale.structure.presett' (did you mean 'preset'?)"),
        (["--set", "upscale.structure.preset=papr"], "unknown preset 'papr' (did you mean 'paper'?)"),
        (["--set", "captions.grid=tile"], "(did you mean 'tiles'?)"),
        (["--method", "xyzzy"], "unknown method 'xyzzy'; known: direct"),
    ],
    ids=" ".join,
)
def test_a_mistyped_name(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "a.png", "b.png", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert answer(capsys, option) == (0, f"resmaster {project['version']}")
    assert resmaster_stages.__version__ == project["version"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upscale", "a.png", "b.pngg"], "unknown image format '.pngg' (did you mean '.png'?)"),
        (["upscale", "a.png", "b.png", "--model", "picturebok"], "model 'picturebok' (did you mean 'picturebook'?)"),
    ],
    ids=" ".join,
)
def test_a_mistyped_format_or_model(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    assert main(words) == 2
    assert said in capsys.readouterr().err
