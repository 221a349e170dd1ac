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

from resmaster_flows.cli.main import parser
from tests.checkout import PYTHONPATH, ROOT
from tests.s3_server import SCRIPT, free_ports, weed

README = (ROOT / "README.md").read_text()

NOT_RUN = {
    "make demo": "downloads packages; its recipe is the `resmaster run` command below",
    "make test": "is what runs this test",
    "python3 -m venv .venv": "needs the package registry; the Makefile does the same before any test",
    ".venv/bin/pip install -c constraints.txt -e '.[dev]'": "needs the package registry; the Makefile does the same "
    "before any test",
    ".venv/bin/python -m pytest": "is what runs this test",
    "resmaster run deployments/datasets/sdxl-4k.yaml --prompts my-prompts.txt --root s3://bucket/datasets": "needs "
    "a GPU, SDXL and a bucket; the command line and the configuration are checked",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The commands that stand for themselves; the block about object storage is a script, with a test of its own."""
    return [line for block in blocks("bash") if block not in scripts() for line in block.splitlines() if line]


def scripts() -> list[str]:
    return [block for block in blocks("bash") if "\nexport " in block]


def test_the_readme_starts_with_what_it_is_a_picture_and_two_commands() -> None:
    lines = README.splitlines()
    assert lines[0].startswith("# ")
    picture = next(i for i, line in enumerate(lines) if line.startswith("!["))
    first_command = next(i for i, line in enumerate(lines) if line == "```bash")
    assert picture < first_command
    assert blocks("bash")[0].split("\n")[:2] == ["make demo", "make test"]


def test_pictures_and_links_exist() -> None:
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
    for command in NOT_RUN:
        if command.startswith("resmaster "):
            parser().parse_args(shlex.split(command)[1:])


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
    assert ran >= 6
    for listed in ("report/index.html", "report/contact-000.png", "manifest.parquet", "index.json", "README.md"):
        assert (tmp_path / "out" / "picturebook" / listed).is_file()
    assert Image.open(tmp_path / "photo-4x.png").size == (256, 192)
    (tmp_path / "photo-4x.png").unlink()
    reading, table, library = blocks("python")
    assert len(run([sys.executable, "-c", reading]).splitlines()) == 8
    assert "agreement_psnr" in run([sys.executable, "-c", table])
    run([sys.executable, "-c", library.replace("steps=20", "steps=2")])
    assert Image.open(tmp_path / "photo-4x.png").size == (256, 192)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_lines_about_object_storage_run(tmp_path: Path) -> None:
    """As they stand, except for the port and the server's end: other programs may use the port of the README."""
    (script,) = scripts()
    workplace(tmp_path, limit=2)
    port = free_ports(5)
    script = script.replace("seaweedfs.sh start", f"seaweedfs.sh start --port {port}").replace(":8333", f":{port}")
    assert script.count(str(port)) == 2
    server = [str(SCRIPT), "stop", "--dir", str(tmp_path / "out" / "seaweedfs")]
    environment = {**reader_environment(), "WEED": str(weed())}
    try:
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "report: s3://datasets/picturebook/report/index.html" in done.stdout
        again = subprocess.run(
            ["bash", "-euc", script.splitlines()[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (again.returncode, again.stdout.startswith("runs already")) == (0, True)
    finally:
        stopped = subprocess.run(server, capture_output=True, text=True)
    assert stopped.stdout == "stopped\n"
    assert subprocess.run(server, capture_output=True, text=True).stdout == "does not run\n"
