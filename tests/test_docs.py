"""Every command of docs/ runs, with stand-in stages, or is listed with the reason why it does not; images and links
exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from resmaster_flows.cli import arguments
from resmaster_flows.cli.main import VERBS, parser
from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.checkout import PYTHONPATH, ROOT
from tests.test_infra import ELSEWHERE

PAGES = sorted((ROOT / "docs").glob("*.md"))
NEIGHBOURS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TUTORIAL = ROOT / "docs" / "tutorial.md"

NOT_RUN = {
    "command-line.md": {
        "resmaster view out/picturebook": "runs until Ctrl-C; tests/gallery/test_serve.py runs it",
        "ssh -t -L 8000:127.0.0.1:8000 my-machine resmaster view out/picturebook --port 8000": "needs another machine",
        'resmaster upscale photo.png photo-4x.png --scale 4 --prompt "a red house" --model picturebook': (
            "tests/test_readme.py runs it"
        ),
        "resmaster compare deployments/datasets/picturebook.yaml --methods multidiffusion,resmaster+sg,resmaster "
        "--scales 2x2,4x4 --n 4": "takes minutes; tests/evaluation/test_compare.py runs the same on less",
        "resmaster run deployments/datasets/sdxl-4k.yaml --prompts my-prompts.txt --root s3://bucket/datasets": (
            "needs a GPU, SDXL and a bucket"
        ),
    },
    "curating.md": {
        "resmaster view out/picturebook": "runs until Ctrl-C; tests/gallery looks through the page in a browser",
    },
    "exporting.md": {
        "resmaster curate out/picturebook --import from-fiftyone/samples.json": (
            "needs an export of FiftyOne; tests/publish/exports/test_page.py runs it on one of ours"
        ),
    },
    "provenance.md": {
        "resmaster export out/picturebook exports/signed --as imagefolder --sign-with chain.pem key.pem": (
            "needs a key; tests/publish/exports/test_signing.py makes one"
        ),
    },
    "extending.md": {
        "RESMASTER_PLUGINS=my_package.tinted,my_package.redness resmaster plan my-dataset.yaml": (
            "test_a_dataset_is_made_with_the_examples_of_extending runs it with the page's modules"
        ),
    },
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
                "scalediff,cascade,pixelrush,hidiffusion,cascade:preset=diffusehigh,cascade:preset=megafusion,"
                "cascade:preset=rectifiedhr,cascade:preset=frecas,cascade:preset=rectifiedhr:guidance_last=7.5,"
                "cascade:preset=frecas:guidance_last=7.5,freescale:fusion=fast,freescale:fusion=neighbourhood,"
                "resmaster:steps=25:guidance_low=1,multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=cosine",
            ),
            ("--n 32 --reference picturebook --scales 2x2,2x4", "scalediff,cascade,pixelrush,hidiffusion"),
            (
                "--n 32 --reference picturebook --scales 2x2",
                "hidiffusion:preset=faithful,cascade:preset=rectifiedhr,cascade:preset=frecas,"
                "cascade:preset=diffusehigh,cascade:preset=megafusion",
            ),
            ("--n 64 --reference picturebook --low-res drawn --scales 4x4", "scalediff,cascade,pixelrush"),
            (
                "--n 32 --reference picturebook --scales 4x4",
                "resmaster:steps=25,resmaster:steps=25:colour_match=mean_std,resmaster:steps=25:colour_match=wavelet,"
                "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear,"
                "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear:colour_match=mean_std,"
                "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear:colour_match=wavelet",
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
    | {
        "resmaster compare deployments/datasets/picturebook-few-step.yaml --n 64 --reference picturebook --scales 4x4 "
        "--methods resmaster,pixelrush,resmaster:start=0.25,resmaster:stepper=renoise": "takes minutes",
        "resmaster compare deployments/datasets/picturebook-controlnet.yaml --n 64 --reference picturebook --scales "
        "4x4 --methods multidiffusion:control.enabled=false,multidiffusion,multidiffusion:init=noise:start=0": "takes "
        "minutes",
        "python docs/chart.py": "writes into the checkout; tests/evaluation/test_chart.py compares what it draws",
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
    "sharing.md": {
        "hf auth login": "asks for a token of the hub",
        "resmaster publish out/picturebook --to hf://datasets/NAMESPACE/NAME --dry-run": (
            "tests/publish/test_hub.py does so at a stand-in of the hub"
        ),
        "resmaster publish out/picturebook --to hf://datasets/NAMESPACE/NAME": (
            "tests/publish/test_hub.py does so at a stand-in of the hub"
        ),
        "AWS_PROFILE=hf resmaster doctor s3://BUCKET/datasets": "needs a bucket of the hub",
    },
    "tutorial.md": {
        'export PATH="$PWD/.venv/bin:$PATH"': "the test has a path of its own",
        "mkdir -p out/first && cd out/first": "the test begins in an empty folder",
    },
    "methods.md": {
        "resmaster compare deployments/datasets/picturebook.yaml --n 1 --root out/strip --scales 4x4 --methods direct,"
        "multidiffusion,resmaster,demofusion,scalecrafter,fouriscale,hidiffusion,freescale,scalediff,"
        "cascade,c_upscale,pixelrush,super_resolution,lanczos": "takes minutes",
        "resmaster compare deployments/datasets/picturebook-controlnet.yaml --n 4 --root out/strip --scales 4x4 "
        "--methods multidiffusion:control.enabled=false,multidiffusion,multidiffusion:init=noise:start=0": "takes "
        "minutes",
        "python docs/method_images.py out/strip/picturebook-controlnet-compare/sheet-4x4.png tiled_img2img controlnet "
        "controlnet_from_noise": "needs the sheet of the command before",
        "python docs/method_images.py out/strip/picturebook-compare/sheet-4x4.png": "needs the sheet of the command "
        "before; tests/evaluation/test_method_images.py cuts a sheet",
        "python -m resmaster_stages.picturebook.training.train_latent_enlarger --model "
        "stabilityai/stable-diffusion-xl-base-1.0 --images photos --edge-px 1024 --count 100000 --work train-sdxl "
        "--steps 100000 --batch 32 --rate 0.0002 --dim 60 --depths 6 6 6 6 --heads 6 --hidden 256 --layers 4": (
            "needs a GPU for a day; tests/picturebook/test_latent_enlarger.py runs it on a tiny model"
        ),
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
        "make soak MINUTES=10": "tests/durability/test_soak.py plays every scene once",
        "make soak KILLS=1000 SEED=1": "takes an hour; tests/durability/test_soak.py plays every scene once",
    },
    "scores.md": {
        "RESMASTER_PLUGINS=my_package.colourful,my_package.snowy resmaster run my-dataset.yaml": (
            "test_the_scores_of_the_page_are_measured runs it with the page's modules"
        ),
    },
    "storage.md": dict.fromkeys(
        (
            "infra/seaweedfs.sh start",
            "export AWS_ENDPOINT_URL=http://127.0.0.1:8333 AWS_ACCESS_KEY_ID=resmaster "
            "AWS_SECRET_ACCESS_KEY=resmaster-secret",
            "resmaster run deployments/datasets/picturebook.yaml --root s3://datasets",
            "resmaster publish out/picturebook",
            "resmaster doctor s3://bucket/prefix",
            "resmaster verify out/picturebook",
            "resmaster repair out/picturebook",
            "resmaster gc out/picturebook --dry-run",
        ),
        "tests/durability/test_page.py runs it",
    ),
    "operating.md": {
        "python docs/screenshots.py --url http://127.0.0.1:4200 docs/images": "needs a server with a real build on it; "
        "tests/server/test_pages.py reads the same pages",
        "resmaster view out": "runs until Ctrl-C; tests/gallery/test_root.py looks at the pages in a browser",
        "resmaster status out --serve": "runs until Ctrl-C; tests/inspection/test_exporter.py runs it",
    },
}
"""Page -> command -> reason. The words after `resmaster` are checked all the same."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands of a page, one a line; lines that end with a backslash are joined with the next."""
    lines = [line for block in blocks(page, "bash") for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES + NEIGHBOURS, ids=lambda page: page.name)
def test_images_and_links_exist(page: Path) -> None:
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


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        assert f"]({page.name})" in index or page.name == "index.md", page.name


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
    [page for page in PAGES if page != TUTORIAL and set(commands(page)) - NOT_RUN.get(page.name, {}).keys()],
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


def statements(block: str) -> list[tuple[str, int]]:
    """The commands of a script, and the exit status that a comment beside each names.

    Files that are written in place are included.
    """
    found = re.findall(r"^(?:cat > \S+ <<'END'\n(?s:.*?)^END$|.+$)", block, flags=re.MULTILINE)
    return [(each, int(status[1]) if (status := re.search(r"# exit status (\d+)", each)) else 0) for each in found]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Every block in order, in an empty folder, by a shell; `resmaster` has stand-in stages."""
    stand_in = tmp_path / "bin" / "resmaster"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.standin_cli "$@"\n')
    stand_in.chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    said = []
    for command, status in (each for block in blocks(TUTORIAL, "bash") for each in statements(block)):
        if command in NOT_RUN[TUTORIAL.name]:
            continue
        done = subprocess.run(
            ["bash", "-c", f"{command}\nexit $?"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        expected = (
            {0, status} if command.startswith("timeout ") else {status}
        )  # stand-ins may be faster than the killer
        assert done.returncode in expected, f"{command}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
    assert sum("000001" in each and "gone" in each for each in said) == 1, "the first verify, not the second"
    assert any("more-prompts.jsonl:3: empty" in each and "1 duplicate left out; 2 rejected" in each for each in said)
    (snippet,) = blocks(TUTORIAL, "python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "agreement_psnr" in done.stdout
    assert len(pq.read_table(folder / "out" / "tutorial" / "manifest.parquet")) == 7


def test_every_verb_has_a_section_with_its_options() -> None:
    """Those that verbs share with `run` are in the section of `run`."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE))
    shared = options(arguments.add_source)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        for option in options(verb.add_arguments) - (set() if name == "run" else shared):
            assert f"`{option}" in sections[name], f"{name} {option}"


def options(add: Callable[[ArgumentParser], None]) -> set[str]:
    """The long options that `add` gives to a verb."""
    verb = ArgumentParser(add_help=False)
    add(verb)
    return {option for action in verb._actions for option in action.option_strings if option.startswith("--")}


def test_the_commands_of_contributing_name_what_is_there() -> None:
    """They install, lint, or run these tests."""
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(ROOT / "CONTRIBUTING.md"):
        program, *words = shlex.split(command)
        if program == "make":
            assert f"\n{words[0]}: " in makefile, command
        else:
            assert words[:2] == ["-m", "pytest"], command
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), command


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


EXTENSIONS = ("tinted", "tiny_flow", "redness", "sharpen", "sheet")
"""The modules of the reader of extending.md, in the order of the page."""

KNOWN_TO_A_WORKER = """
from resmaster_flows.process import process_shards
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset.stages import STAGES

assert load_config("config.yaml").upscale.tint == 0.2
assert list(STAGES)[-1] == "sharpen"
"""

BUILT_WITH_EXTENSIONS = """
import io
import tarfile

import my_package.tinted, my_package.tiny_flow, my_package.redness, my_package.sharpen, my_package.sheet
from PIL import Image
from resmaster_stages.config.load import load_config
from resmaster_stages.library import read_samples
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage

dataset = ingest(load_config("config.yaml"))
assert list(dataset.hashes) == ["low_res", "high_res", "quality", "sharpen"]
receipts = [run_stage(dataset, stage, 0) for stage in dataset.hashes]
assert {receipt.samples_ok for receipt in receipts} == {2}
first, second = (row["redness"] for _, row in read_samples(dataset))
assert 0.5 < first < second < 1, "the level, moved by letters"
with tarfile.open(fileobj=io.BytesIO(dataset.folder.read(receipts[-1].objects[0].name))) as tar:
    sizes = [Image.open(tar.extractfile(member)).size for member in tar if member.name.endswith(".png")]
assert sizes == [(32, 32)] * 2
assert publish(dataset).samples == 2
"""


def test_a_dataset_is_made_with_the_examples_of_extending(tmp_path: Path) -> None:
    """Each in a module of the reader's own, planned by the command of the page, known to a worker, and then built."""
    import torch
    from safetensors.torch import save_file

    examples = blocks(ROOT / "docs" / "extending.md", "python")
    (command,) = blocks(ROOT / "docs" / "extending.md", "bash")
    command = command.strip().replace("my-dataset.yaml", "config.yaml")
    package = tmp_path / "my_package"
    package.mkdir()
    for name, example in zip(EXTENSIONS, examples, strict=True):
        (package / f"{name}.py").write_text(example)
    assert command.startswith("RESMASTER_PLUGINS=my_package.tinted,my_package.redness resmaster ")
    modules = ",".join(f"my_package.{name}" for name in EXTENSIONS)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "TinyFlowPipeline"}')
    (model / "flow.json").write_text('{"native": 16}')
    save_file({"level": torch.tensor(0.5)}, model / "weights.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\nzzzzzz\n")
    upscale = {"method": "tinted", "tint": 0.2, "scale": 2, "steps": 4}
    config = {"name": "d", "prompts": "prompts.txt", "model": {"id": str(model)}, "upscale": upscale}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHONPATH}"}

    def python(*words: str, plugins: str = modules, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**environment, "RESMASTER_PLUGINS": plugins},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout or done.stderr

    verb = ("-m", "resmaster_flows.cli.main", *shlex.split(command)[2:])
    said = python(*verb)
    assert "tinted, 16 x 16 px to 32 x 32 px" in said
    assert "sharpen" in said
    python("-c", KNOWN_TO_A_WORKER)
    python("-c", BUILT_WITH_EXTENSIONS)
    python("-m", "resmaster_flows.cli.main", "export", "out/d", "exported", "--as", "csv", "--where", "redness > 0")
    lines = (tmp_path / "exported" / "samples.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["prompt", "a cat", "zzzzzz"]
    error = python(*verb, plugins="my_package.tinted, my_package.gone", status=2)
    assert re.fullmatch(r"resmaster: RESMASTER_PLUGINS: cannot import my_package.gone \(ModuleNotFound.*\n", error)


def test_the_scores_of_the_page_are_measured(tmp_path: Path) -> None:
    """By the command of the page, with the modules of the reader's own; and the head of the page has LAION's layers."""
    import torch
    from PIL import Image

    from resmaster_stages.metrics.score_models import head_layers

    page = ROOT / "docs" / "scores.md"
    convert, colourful, snowy = blocks(page, "python")
    package, images = tmp_path / "my_package", tmp_path / "images"
    package.mkdir()
    images.mkdir()
    (package / "colourful.py").write_text(colourful)
    (package / "snowy.py").write_text(snowy)
    for name, colour in (("grey", (90, 90, 90)), ("blue", (0, 0, 255))):
        image = Image.new("RGB", (32, 32), (90, 90, 90))
        image.paste(colour, (0, 0, 32, 16))
        image.save(images / f"{name}.png")
    quality = {"clip": "picturebook", "device": "cpu"}
    config = {"name": "d", "images": "images", "upscale": {"method": "lanczos", "scale": 2}, "quality": quality}
    (tmp_path / "my-dataset.yaml").write_text(yaml.safe_dump(config))
    (command,) = commands(page)
    plugins, program, *words = shlex.split(command)
    assert program == "resmaster"
    variable, _, modules = plugins.partition("=")
    environment = {**os.environ, variable: modules, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PYTHONPATH}"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {
        row["source"].rpartition("/")[2]: row for row in pq.read_table(tmp_path / "out/d/manifest.parquet").to_pylist()
    }
    assert rows["grey.png"]["colourfulness"] == pytest.approx(0, abs=1e-3)
    assert "grey" in rows["grey.png"]["flags"]
    # half of it blue: a is 0; b is 0 or -255, so its deviation is 127.5 and its mean -127.5
    assert rows["blue.png"]["colourfulness"] == pytest.approx(127.5 * 1.3, rel=0.1), "less where Lanczos blurs"
    assert all(0 < row["snowy"] < 1 for row in rows.values())

    sizes = [768, 1024, 128, 64, 16, 1]
    layers = {number: torch.nn.Linear(*sizes[at : at + 2]) for at, number in enumerate((0, 2, 4, 6, 7))}
    state = {
        f"layers.{number}.{name}": value
        for number, layer in layers.items()
        for name, value in layer.state_dict().items()
    }
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    subprocess.run([sys.executable, "-c", convert], cwd=tmp_path, check=True)
    assert head_layers(tmp_path / "aesthetic-head.safetensors", 768) == [f"layers.{number}." for number in layers]


def test_the_settings_of_the_page_on_scores_can_be_set() -> None:
    for block in blocks(ROOT / "docs" / "scores.md", "yaml"):
        values = yaml.safe_load(block)["quality"]
        set_ = QualityConfig(**values).model_fields_set
        assert set_ == values.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_the_thresholds_of_the_flags_are_those_of_the_settings() -> None:
    page = (ROOT / "docs" / "evaluation-protocol.md").read_text()
    shown = dict(re.findall(r"(?:above|below) `((?:min|max)_\w+)` \| ([\d.]+)", page))
    fields = {name: field.default for name, field in QualityConfig.model_fields.items() if name[:4] in ("min_", "max_")}
    assert shown.keys() == fields.keys()
    for name, default in fields.items():
        assert float(shown[name]) in (default, 100 * default), name  # shares are shown in per cent


def test_the_demo_takes_the_rows_that_its_pages_name() -> None:
    demo = ROOT / "deployments" / "datasets" / "picturebook.yaml"
    rows = sum(
        part.rows * part.area
        for part in high_res_work(load_config(demo).upscale, Denoising(Geometry(128, 8)), 128, 128)
    )
    assert f"{rows:.0f} rows an image" in demo.read_text()
    assert f"{rows:.0f} rows an image" in (ROOT / "docs" / "speed.md").read_text()
