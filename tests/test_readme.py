"""Every command and snippet of the README runs. Those that cannot run here are listed with the reason."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.checkout import PYTHONPATH, ROOT

README = (ROOT / "README.md").read_text()

INSTALLATIONS = (
    "pip install .",
    "pip install -c constraints.txt '.[pipeline,s3]'",
    "uv tool install '.[pipeline,s3]'",
    "pipx install '.[pipeline,s3]'",
)
NOT_RUN = {
    "make demo": "downloads packages; its recipe is the `resmaster run` command below",
    "make test": "is what runs this test",
    **dict.fromkeys(INSTALLATIONS, "needs the package registry; the Makefile installs more before any test"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def test_the_readme_starts_with_what_it_is_a_image_and_two_commands() -> None:
    lines = README.splitlines()
    assert lines[0].startswith("# ")
    image = next(i for i, line in enumerate(lines) if line.startswith("!["))
    first_command = next(i for i, line in enumerate(lines) if line == "```bash")
    assert image < first_command
    assert blocks("bash")[0].split("\n")[:2] == ["make demo", "make test"]
    assert "](" not in "".join(lines[1:image]), "no link before the reader knows what this is"


def test_the_readme_takes_one_screen() -> None:
    body, _, _ = README.partition("<details>")
    assert len([line for line in body.splitlines() if line]) <= 80
    drawn, _, _ = README.partition("## What you get")
    for stage in ("plan", "low_res", "captions", "high_res", "quality", "commits", "manifest", "report"):
        assert stage in drawn[drawn.index("## How it works") :]


def test_images_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "resmaster run deployments/datasets/picturebook.yaml" in makefile


def test_what_is_not_run_is_still_in_the_readme() -> None:
    assert set(NOT_RUN) <= set(commands())


def workplace(folder: Path, limit: int) -> None:
    """What the README's commands need in a folder; the demo is cut to `limit` prompts and few steps."""
    shutil.copytree(ROOT / "deployments", folder / "deployments")
    for name in ("resmaster_stages", "infra"):
        (folder / name).symlink_to(ROOT / name)
    demo = folder / "deployments" / "datasets" / "picturebook.yaml"
    config = yaml.safe_load(demo.read_text())
    config["limit"] = limit
    config["low_res"]["steps"] = config["upscale"]["steps"] = 2
    config["upscale"]["scale"] = 1.5
    demo.write_text(yaml.safe_dump(config))


def reader_environment() -> dict[str, str]:
    programs = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_and_snippets_run(tmp_path: Path) -> None:
    """In order, in one folder, as a reader would; the demo is cut to 8 prompts in 2 shards of few steps."""
    workplace(tmp_path, limit=8)
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "photo.png")
    environment = reader_environment()

    def run(arguments: list[str]) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    ran = 0
    for command in commands():
        if command in NOT_RUN:
            continue
        words = shlex.split(command.removeprefix(".venv/bin/"))
        if words[0] == "resmaster" and words[1] == "upscale":
            words += ["--steps", "2"]
        run(words)
        ran += 1
    assert ran == 4
    for listed in ("report/index.html", "manifest.parquet", "index.json", "low_res", "captions", "quality"):
        assert (tmp_path / "out" / "picturebook" / listed).exists()
    assert Image.open(tmp_path / "photo-4x.png").size == (256, 192)
    (reading,) = blocks("python")
    assert len(run([sys.executable, "-c", reading]).splitlines()) == 8
