"""`resmaster completion`: what real shells complete with its scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from resmaster_flows.cli.main import VERBS, main
from resmaster_stages.config.method import methods
from resmaster_stages.config.model import SDXL


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script for each shell, and some files to complete."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "photos").mkdir()
    for name in ("mine.yaml", "photo.png", "notes.txt"):
        (folder / name).touch()
    return folder


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = folder / f"resmaster.{shell}"
    if not path.exists():
        capsys.readouterr()
        assert main(["completion", shell]) == 0
        path.write_text(capsys.readouterr().out)
    return path


def of_bash(path: Path, words: list[str]) -> set[str]:
    """What bash's own completion machinery calls and gets."""
    drive = (
        f"source {path}; "
        'COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); '
        'spec=$(complete -p resmaster); read -r -a parts <<< "$spec"; '
        'for i in "${!parts[@]}"; do [ "${parts[i]}" = -F ] && "${parts[i + 1]}" resmaster; done; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", drive, "bash", *words], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], {"repair"}),
        (["st"], {"status"}),
        (["upscale", "--me"], {"--method"}),
        (["upscale", "--method", "sc"], {"scalecrafter", "scalediff"}),
        (["upscale", "--preset", "fa"], {"faithful"}),
        (["upscale", "--model", "stabilityai/stable-diffusion-x"], {SDXL["id"]}),
        (["upscale", "a.png", "b.png", "--output-format", "j"], {"jpeg", "jxl"}),
        (["upscale", "pho"], {"photo.png", "photos"}),
        (["run", ""], {"mine.yaml", "photos"}),
        (["run", "mine.yaml", "--executor", "d"], {"dask"}),
        (["status", ""], {"photos"}),
        (["-q", "ver"], {"verify"}),
        (["export", "x", "y", "--as", "image"], {"imagefolder"}),
        (["init", "new", "--base", "sdxl-c"], {"sdxl-controlnet-4k"}),
        (["completion", "f"], {"fish"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash(words: list[str], expected: set[str], scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert of_bash(script("bash", scripts, capsys), ["resmaster", *words]) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_knows_every_verb_and_method(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("bash", scripts, capsys)
    assert of_bash(path, ["resmaster", ""]) == {verb.name for verb in VERBS}
    assert of_bash(path, ["resmaster", "upscale", "--method", ""]) == set(methods())


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("resmaster re", {"repair"}),
        ("resmaster upscale --method sc", {"scalecrafter", "scalediff"}),
        ("resmaster upscale a.png --output-fo", {"--output-format"}),
        ("resmaster run min", {"mine.yaml"}),
    ],
)
def test_fish(line: str, expected: set[str], scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("fish", scripts, capsys)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {path}; complete --do-complete '{line}'"],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {each.partition("\t")[0] for each in done.stdout.splitlines()} == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("resmaster repa", "resmaster repair "),
        ("resmaster upscale --method hidif", "resmaster upscale --method hidiffusion "),
    ],
)
def test_zsh(line: str, expected: str, scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real interactive zsh in a terminal: after a tab, the line is printed by a key of the test's own."""
    path = script("zsh", scripts, capsys)
    folder = scripts / "functions"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "_resmaster")
    program = f"""
zmodload zsh/zpty
zpty z zsh -f -i
say() {{ zpty -w z "$1" }}
say 'PROMPT=; fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D'
say 'show() {{ print -r -- "<$BUFFER>"; BUFFER=; zle accept-line }}; zle -N show; bindkey "^X" show; print rea"dy"'
zpty -r -m z found '*ready*'
zpty -w -n z $'{line}\\t\\x18'
zpty -r -m z found '*<*>*'
print -r -- "$found"
zpty -d z
"""
    done = subprocess.run(
        ["zsh", "-f", "-c", program], cwd=path.parent, capture_output=True, text=True, check=True, timeout=120
    )
    assert f"<{expected}>" in done.stdout


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bsh"])
    assert ended.value.code == 2
    assert "invalid choice: 'bsh' (did you mean 'bash'?)" in capsys.readouterr().err
