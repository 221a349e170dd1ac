"""The GPU programme runs without a GPU, on a bare machine and in time; its numbers reach the page; what travels is
small."""

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as programme
from benchmarks.gpu import tables
from benchmarks.gpu.record import Record, Run, read
from tests.checkout import PYTHONPATH, ROOT

ABSENT = ("prefect", "pyarrow", "webdataset", "s3fs", "aiobotocore", "botocore", "fastapi", "sqlalchemy")
"""Packages that a GPU machine need not have."""

REFUSING = f"""
import importlib.abc, sys
class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refusing())
"""

DRAWING = """
import importlib
for name in (
    "resmaster_stages.runner.compute", "resmaster_stages.methods.render", "resmaster_stages.picturebook.training.train",
    "resmaster_stages.picturebook.training.train_flow", "resmaster_stages.picturebook.training.export_flow",
    "resmaster_stages.picturebook.training.evaluate", "benchmarks.gpu.__main__", "benchmarks.gpu.ceilings",
    "benchmarks.gpu.rows", "benchmarks.gpu.image", "benchmarks.gpu.flow", "benchmarks.gpu.truth",
    "benchmarks.gpu.training", "tests.conftest", "tests.test_gpu",
):
    importlib.import_module(name)
from PIL import Image
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.models.load import load_models
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
image = Image.effect_noise((128, 128), 60).convert("RGB")
config = ResMaster(scale=1.25, steps=2, view_batch=4)
image = upscale_image(load_models(ModelConfig(device="cpu")), image, "a red house", config=config)
assert image.size == (160, 160)
"""


def python(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=given, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_engine_training_and_programme_do_without_the_pipelines_packages() -> None:
    done = python("-c", REFUSING + DRAWING)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a rehearsal of all steps leaves, without the pipeline's packages."""
    folder = tmp_path_factory.mktemp("gpu")
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(REFUSING)
    out = folder / "out"
    words = ["-m", "benchmarks.gpu", "--rehearse", "--seconds", "4000", "--out", str(out)]
    done = python(*words, PYTHONPATH=f"{site}{os.pathsep}{PYTHONPATH}")
    (out / "printed").write_text(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(out / 'log.txt').read_text()[-3000:]}"
    return out


def entries(value: Any) -> list[dict[str, Any]]:
    """All entries of all lists of findings."""
    return [each for step in value["steps"].values() for found in step["found"].values() for each in _dicts(found)]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_does_every_step(rehearsal: Path) -> None:
    report = read(rehearsal / "gpu.json")
    assert list(report["steps"]) == list(programme.SHARES)
    assert {step["status"] for step in report["steps"].values()} == {"done"}
    assert report["about"]["rehearsal"] is True
    failed = [each for each in entries(report) if "error" in each]
    assert not [each for each in failed if "float8" not in each["dtype"]], "only some releases of torch have it on CPUs"
    left_out = [each for each in entries(report) if {"left_out", "skipped"} & set(each)]
    assert all("fp8" in each.get("variant", each.get("what", "")) for each in left_out)
    rows, methods = report["steps"]["rows"]["found"]["rows"], report["steps"]["image"]["found"]["methods"]
    assert {each["variant"] for each in rows} >= {"eager", "compiled blocks", "compiled whole, max-autotune"}
    assert all(each["ms_per_row"] > 0 for each in rows if "left_out" not in each)
    assert {each["what"] for each in methods} == set(programme_methods())
    shares = [each["shares"] for each in report["steps"]["rows"]["found"]["profiles"]]
    assert all(sum(each.values()) == pytest.approx(1) for each in shares)
    flow = report["steps"]["flow"]["found"]
    assert {(each["what"], each["variant"], each["views"]) for each in flow["views"]} == {
        (model, variant, views)
        for model in ("FLUX.1-dev", "Z-Image-Turbo")
        for variant in ("eager", "compiled blocks")
        for views in (1, 2, 4, 8)
    }
    assert all(each["row_bytes_expected"] > 0 for each in flow["views"])
    assert [each["reckoned"]["steps"] for each in flow["images"]] == [28, 8]
    assert all(each["rows"] == 9 * each["steps_measured"] for each in flow["images"])
    memory = report["steps"]["truth"]["found"]["out_of_memory"][0]
    assert memory["tried"] == [9, 4]
    assert memory["greatest_levels"] == 0


def programme_methods() -> tuple[str, ...]:
    from resmaster_stages.config.method import methods

    return tuple(name for name, each in methods().items() if each.base_model)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_comes_back_is_small_and_whole(rehearsal: Path, tmp_path: Path) -> None:
    files = [path for path in rehearsal.rglob("*") if path.is_file() and path.name != "printed"]
    assert len(files) <= 7, "and samples.png of a run on a GPU makes eight"
    assert all(path.parent == rehearsal and path.stat().st_size < 16 * 2**20 for path in files)
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in files)
    whole = tmp_path / "pack.tar"
    whole.write_bytes(b"".join(path.read_bytes() for path in sorted(rehearsal.glob("pack.tar.*"))))
    with tarfile.open(whole) as tar:
        tar.extractall(tmp_path, filter="data")
    card = json.loads((tmp_path / "pack" / "card.json").read_text())
    assert card["stages"]["vae"]["steps"] == card["stages"]["unet"]["steps"] == 2
    assert set(card["stages"]) == {"vae", "unet"}, "the others are the shipped pack's"
    assert (tmp_path / "pack" / "captioner" / "model.safetensors").stat().st_size > 1e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_numbers_reach_the_page(rehearsal: Path, tmp_path: Path) -> None:
    report = read(rehearsal / "gpu.json")
    assert tables.markdown(report) in (rehearsal / "printed").read_text()
    page, given = tmp_path / "speed.md", tmp_path / "gpu.json"
    page.write_text((ROOT / "docs" / "speed.md").read_text())
    given.write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="rehearsal"):
        tables.main([str(page), str(given)])
    report["about"].update(rehearsal=False, device="A card")
    given.write_text(json.dumps(report))
    tables.main([str(page), str(given)])
    tables.main([str(page), str(given)])  # once more changes nothing
    text = page.read_text()
    assert text.count("A card, torch") == 1
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1
    eager = report["steps"]["rows"]["found"]["rows"][0]
    assert f"| eager | float16 | 2 | {eager['ms_per_row']:.2f} |" in text


def test_a_step_that_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU and without `--rehearse` every step fails, and says why."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert programme.main(["--out", str(tmp_path), "--seconds", "60", "--only", "training,ceilings"]) == 1
    report = read(tmp_path / "gpu.json")
    assert {step: each["status"] for step, each in report["steps"].items()} == {
        "ceilings": "failed",
        "training": "failed",
    }
    assert "--rehearse runs every step on a CPU" in report["steps"]["ceilings"]["error"]
    assert "Step training: failed: RuntimeError: there is no CUDA device" in capsys.readouterr().out


def test_a_step_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had found stays."""
    hanging = tmp_path / "benchmarks" / "gpu"
    hanging.mkdir(parents=True)
    (hanging / "__main__.py").write_text(
        "import json, pathlib, time\n"
        "path = pathlib.Path('gpu.json')\n"
        "report = json.loads(path.read_text())\n"
        "report['steps']['ceilings']['found'] = {'ceilings': [{'what': 'copy'}]}\n"
        "path.write_text(json.dumps(report))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programme, "GRACE_SECONDS", 0.0)
    plan = programme.Programme(("ceilings",), 24.0, tmp_path, True)
    assert programme.run(plan) == 1
    step = read(tmp_path / "gpu.json")["steps"]["ceilings"]
    assert step["status"] == "stopped"
    assert step["found"]["ceilings"] == [{"what": "copy"}]
    assert step["seconds"] < 12


def test_an_entry_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    record = Record(tmp_path / "gpu.json", "rows")
    record.attempt("rows", lambda: {"ms_per_row": 1 / 0}, variant="eager", dtype="float16", rows=26)
    record.attempt("rows", lambda: {"ms_per_row": 14.2}, variant="compiled blocks", dtype="float16", rows=98)
    report = read(tmp_path / "gpu.json")
    report["steps"]["rows"]["status"] = "done"
    text = tables.markdown(report)
    assert "- eager, float16, 26: FAILED: ZeroDivisionError: division by zero" in text
    assert "| compiled blocks | float16 | 98 | 14.20 |" in text


def test_what_time_does_not_allow_is_listed(tmp_path: Path) -> None:
    record = Record(tmp_path / "gpu.json", "rows")
    run = Run(record, "cuda", False, 0.0, tmp_path)
    assert run.skip("rows", 30.0, variant="eager", dtype="float16", rows=98)
    assert "about 30 s were needed" in read(tmp_path / "gpu.json")["steps"]["rows"]["found"]["rows"][0]["skipped"]


def test_steps_share_the_time() -> None:
    plan = programme.Programme(tuple(programme.SHARES), 520.0, Path("out"), False)
    ends = plan.ends(1000.0)
    assert sum(programme.SHARES.values()) == pytest.approx(1)
    assert list(ends.values()) == sorted(ends.values())
    assert ends["training"] == pytest.approx(1000 + 520 - programme.CLOSING_SECONDS)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn::ops::nchwToNhwcKernel<__half>", "copies"),
        ("triton_poi_fused_gelu_mul_3", "norms and elementwise"),
        ("void at::native::elementwise_kernel<128, 4>", "norms and elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    from benchmarks.gpu.rows import kind_of

    assert kind_of(kernel) == kind


def test_what_travels_and_what_is_there_are_all_that_is_needed() -> None:
    """The wheels of the script, and what the page says that a machine brings, with what those need themselves."""
    script, page = (ROOT / "benchmarks/gpu_wheels.sh").read_text(), (ROOT / "docs" / "gpu.md").read_text()
    found = re.search(r"^packages=\((.*)\)$", script, flags=re.MULTILINE)
    listed = re.search(r"A machine with Python 3.12, (.*?) lacks", page, flags=re.DOTALL)
    assert found
    assert listed
    travelling = found[1].split()
    there = re.split(r",\s|\sand\s", listed[1])
    brought = ("filelock", "regex")  # by torch and transformers
    known = {_name(each) for each in (*travelling, *there, *brought)}
    for package in travelling:
        for line in [] if package == "torchao" else metadata.requires(package) or []:
            if "extra ==" not in line:
                assert _name(line) in known, f"{package} needs {line}"
    for package in ("diffusers", "pydantic", "resvg_py"):
        assert package in travelling


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def blocks_operations(blocks: int, tokens: int, width: int, weights: int) -> float:
    """Operations of transformer blocks on `tokens` tokens: `weights` of a block are multiplied with each token, and
    attention compares all tokens with each other and mixes them."""
    return blocks * (2 * weights * tokens + 4 * tokens**2 * width)


def test_a_view_of_a_transformer_is_counted() -> None:
    """As the blocks' sizes say, by hand: attention of 4 and a feed-forward of 8 squares of the width (FLUX.1), and a
    gated one of 8/3 times the width (Z-Image). What is beside the blocks takes less than half a percent."""
    from benchmarks.gpu.flow_models import FLUX, Z_IMAGE, operations_per_view

    image, page = 64 * 64, (ROOT / "docs" / "gpu.md").read_text()
    flux = blocks_operations(19 + 38, image + 512, 3072, 12 * 3072**2)
    block = 4 * 3840**2 + 3 * 3840 * 10_240
    z_image = sum(
        blocks_operations(blocks, tokens, 3840, block) for blocks, tokens in ((30, image + 128), (2, image), (2, 128))
    )
    for shape, expected in ((FLUX, flux), (Z_IMAGE, z_image)):
        counted = operations_per_view(shape, toy=False)
        assert counted == pytest.approx(expected, rel=0.005)
        assert f"| {shape.name}, {shape.states[0]} text tokens |" in page
        assert f" | {counted / 1e12:.1f} | not measured yet |" in page


def test_the_page_tells_the_size_of_transformers() -> None:
    import torch

    from benchmarks.gpu.flow_models import SHAPES, network

    page = (ROOT / "docs" / "gpu.md").read_text()
    for shape in SHAPES:
        count = sum(p.numel() for p in network(shape, torch.device("meta"), toy=False).parameters())
        assert f"| {count / 1e9:.1f} billion | {2 * count / 1e9:.1f} GB |" in page


def test_a_transformer_is_made_in_bfloat16_with_texts_of_its_shape() -> None:
    """Both can be made and called without a GPU, and leave the process's number format as it was."""
    import torch

    from benchmarks.gpu.flow_models import SHAPES, forward, whole

    for shape in SHAPES:
        models = whole(shape, torch.device("cpu"), toy=True)
        assert {p.dtype for p in models.base.denoiser.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in models.base.vae.parameters()} == {torch.float32}
        assert models.base.row_bytes(8, 8) > 0
        drawn = forward(models, 3)()
        assert drawn.shape == (3, 16, 8, 8)
        assert drawn.isfinite().all()
        assert torch.get_default_dtype() == torch.float32


def test_a_row_is_counted() -> None:
    from benchmarks.gpu.models import operations_per_row

    assert operations_per_row(toy=False) / 1e12 == pytest.approx(6.77, abs=0.02)
