"""Every command of docs/ runs, with stand-in stages, or is listed with the reason why it does not; pictures and links
exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resmaster_flows.cli.main import parser
from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.planning.workload import high_res_work
from tests.checkout import PYTHONPATH, ROOT
from tests.test_infra import ELSEWHERE

PAGES = sorted((ROOT / "docs").glob("*.md"))

NOT_RUN = {
    "evaluation-protocol.md": {
        "resmaster compare deployments/datasets/picturebook.yaml --scales 2x2,2x4,4x4 --n 64 "
        "--methods direct,multidiffusion,resmaster+sg,resmaster+sg+tip,resmaster": "takes minutes to hours; "
        "tests/evaluation/test_compare.py runs the same on less"
    },
    "evaluation-results.md": {
        f"resmaster compare deployments/datasets/picturebook-evaluation.yaml {options} --methods {methods}": "takes "
        "minutes to hours; tests/evaluation/test_compare.py runs the same on less"
        for options, methods in (
            (
                "--n 64 --reference picturebook --scales 4x4",
                "lanczos,super_resolution,direct,multidiffusion,resmaster:steps=25,resmaster:steps=14:shift_stop=0.7,"
                "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear,"
                "multidiffusion:init=noised_lr:start=0.5:stride=0.75:fuse=linear,"
                "c_upscale,demofusion,freescale,scalecrafter,fouriscale",
            ),
            (
                "--n 32 --reference picturebook --scales 2x2,2x4",
                "direct,super_resolution,multidiffusion,resmaster:steps=25,c_upscale,demofusion,freescale,scalecrafter,fouriscale",
            ),
            (
                "--n 64 --reference picturebook --scales 4x4",
                "multidiffusion,resmaster-sg-tip-etp:steps=25,resmaster+sg:steps=25,resmaster+sg+tip:steps=25,resmaster:steps=25",
            ),
            (
                "--n 64 --reference picturebook --low-res drawn --scales 4x4",
                "lanczos,super_resolution,direct:init=noised_lr:start=0.65,direct:init=noised_lr:start=0.5,"
                "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear,"
                "multidiffusion:init=noised_lr:start=0.5:stride=0.75:fuse=linear,"
                "c_upscale,resmaster:steps=25,resmaster:steps=14:shift_stop=0.7",
            ),
        )
    }
    | {"python benchmarks/flags.py --seed 2": "takes minutes; tests/test_benchmarks.py runs it on less"}
    | {
        f"python benchmarks/true_scenes.py{options}": "takes an hour; tests/test_benchmarks.py runs it on less"
        for options in (
            "",
            " --methods resmaster:steps=14:shift_stop=0.7,resmaster:steps=14:shift_stop=0.7:structure.preset=paper,"
            "resmaster:steps=14:shift_stop=0.7:structure.preset=paper_decay,"
            "resmaster:steps=14:shift_stop=0.7:structure.preset=lr_nyquist",
            " --n 16 --methods resmaster:preset=exact:steps=50,resmaster:steps=25,"
            "resmaster:steps=50:stepper=ddim_implied,resmaster:steps=25:start=0,resmaster:steps=25:shift=none,resmaster:steps=25:shift=none:stride=0.75,"
            "resmaster:steps=25:guidance_stop=1,resmaster:steps=25:start=0.5,resmaster:steps=14:shift_stop=0.7",
        )
    },
    "deploying.md": ELSEWHERE,
    "methods.md": {
        "resmaster compare deployments/datasets/picturebook.yaml --n 1 --root out/strip --scales 4x4 --methods direct,"
        "multidiffusion,resmaster,demofusion,scalecrafter,fouriscale,freescale,c_upscale,super_resolution,"
        "lanczos": "takes minutes",
    },
    "speed.md": {
        "python benchmarks/methods.py": "takes minutes",
        "python -m benchmarks.peers": "takes minutes; tests/test_benchmarks.py runs it on less",
        "python benchmarks/methods.py --model sdxl --device cuda --flops": "needs a GPU",
    },
    "gpu.md": {
        "python -m benchmarks.gpu --seconds 520 --out out/gpu": "needs a GPU; "
        "tests/test_gpu_programme.py rehearses it on a CPU",
        "python -m benchmarks.gpu.tables docs/speed.md out/gpu/gpu.json": "needs a GPU's report; "
        "tests/test_gpu_programme.py runs it on a rehearsal's",
        "benchmarks/gpu_wheels.sh": "needs the package registry",
    },
    "scale.md": {
        "python -m benchmarks.scale --shards 100,1000": "takes minutes; tests/durability/test_scale.py runs it on less",
        "python -m benchmarks.scale --shards 100,1000,10000 "
        '--steps "plan,fill,look,status,manifest,verify,gc"': "takes minutes; "
        "tests/durability/test_scale.py runs it on less",
        "python -m benchmarks.scale --s3 --shards 1000,10000 --samples 10 "
        '--steps "plan,fill" --keep out/scale': "takes minutes, and a server",
        "python -m benchmarks.scale --s3 --shards 1000,10000 --samples 10 --steps "
        '"look,status,gc,manifest,verify" --keep out/scale': "takes minutes, and what the one before it built",
        "make soak MINUTES=10": "tests/durability/test_soak.py runs it for seconds",
    },
    "storage.md": dict.fromkeys(
        (
            "resmaster doctor s3://bucket/prefix",
            "resmaster verify out/picturebook",
            "resmaster repair out/picturebook",
            "resmaster gc out/picturebook --dry-run",
        ),
        "tests/durability/test_page.py runs it on a small dataset",
    ),
    "operating.md": {
        "python docs/screenshots.py --url http://127.0.0.1:4200 docs/images": "needs a server with a real build on it; "
        "tests/server/test_pages.py reads the same pages",
    },
}
"""Page -> command -> reason. The words after `resmaster` are checked all the same."""


def commands(page: Path) -> list[str]:
    """The commands of a page, one a line; lines that end with a backslash are joined with the next."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


def anchors(page: Path) -> list[str]:
    """The names by which links reach a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_what_is_not_run_is_still_there_and_parses() -> None:
    for name, listed in NOT_RUN.items():
        assert set(listed) <= set(commands(ROOT / "docs" / name)), name
        for command in listed:
            if command.startswith("resmaster "):
                parser().parse_args(shlex.split(command)[1:])


RUNNER = """
import json, sys
from resmaster_flows.cli.main import main
from tests.fake_stages import FAKES
from tests.standin_cli import install

install(FAKES)
for words in json.load(sys.stdin):
    print("==== resmaster", *words, flush=True)
    if status := main(words):
        sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if set(commands(page)) - NOT_RUN.get(page.name, {}).keys()],
    ids=lambda page: page.name,
)
def test_the_commands_run(page: Path, tmp_path: Path) -> None:
    """In order, in one folder, as a reader would, on two shards; in one process, which spares every command the
    start."""
    shutil.copytree(ROOT / "deployments", tmp_path / "deployments")
    demo = tmp_path / "deployments" / "datasets" / "picturebook.yaml"
    demo.write_text(demo.read_text() + "\nlimit: 8\n")
    (tmp_path / "resmaster_stages").symlink_to(ROOT / "resmaster_stages")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    listed = NOT_RUN.get(page.name, {})
    due = [shlex.split(command) for command in commands(page) if command not in listed]
    for words in due:
        assert words[0] == "resmaster", f"{shlex.join(words)}: is neither run nor listed with a reason"
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([words[1:] for words in due]),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("==== resmaster") == len(due)


def test_the_thresholds_of_the_flags_are_those_of_the_settings() -> None:
    page = (ROOT / "docs" / "evaluation-protocol.md").read_text()
    shown = dict(re.findall(r"(?:above|below) `((?:min|max)_\w+)` \| ([\d.]+)", page))
    fields = {name: field.default for name, field in QualityConfig.model_fields.items() if name[:4] in ("min_", "max_")}
    assert shown.keys() == fields.keys()
    for name, default in fields.items():
        assert float(shown[name]) in (default, 100 * default), name  # shares are shown in per cent


def test_the_demo_takes_the_rows_that_its_pages_name() -> None:
    demo = ROOT / "deployments" / "datasets" / "picturebook.yaml"
    rows = sum(part.native_rows for part in high_res_work(load_config(demo).upscale, 128, 128, 128, 8))
    assert f"{rows:.0f} rows an image" in demo.read_text()
    assert f"{rows:.0f} rows an image" in (ROOT / "docs" / "speed.md").read_text()
