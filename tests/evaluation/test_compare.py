"""Comparing methods: which datasets, the same low-res bytes for all, what they cost, and what is measured."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console

from resmaster_flows.cli.compare import print_tables
from resmaster_flows.cli.main import main, parser
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset, planned_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.diffusion.cost import count_call, counting
from resmaster_stages.errors import ConfigError, SampleError, UserError
from resmaster_stages.evaluation import compare as comparing
from resmaster_stages.evaluation.compare import Build, Comparison, finished_samples, share_low_res
from resmaster_stages.evaluation.drawn import REPLICA, true_enlargement
from resmaster_stages.evaluation.page import SheetRow, sheet
from resmaster_stages.evaluation.reference import reference_features, true_features
from resmaster_stages.evaluation.set_metrics import read_features, stacked
from resmaster_stages.evaluation.variants import at_scale, low_res_size, variants
from resmaster_stages.inspection.status import pending
from resmaster_stages.metrics.agreement import agreement
from resmaster_stages.metrics.features import image_features
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights
from resmaster_stages.picturebook.truth import true_image
from resmaster_stages.planning.checks import check_sizes
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.report import write_report
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.images import encode_image
from tests import fake_stages
from tests.checkout import ROOT
from tests.evaluation.test_set_metrics import Means
from tests.fake_stages import FAKES, UNREAD, planned, png

GEOMETRY = Geometry(native_px=16, latent_factor=8)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model: fixed weights and sizes, means as features."""
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    for module in ("evaluation.variants", "evaluation.reference", "planning.checks"):
        monkeypatch.setattr(f"resmaster_stages.{module}.geometry_of", lambda model: GEOMETRY)
    monkeypatch.setattr("resmaster_stages.planning.checks.family_of", lambda model: UNREAD)
    monkeypatch.setattr("resmaster_stages.metrics.features.load_extractor", lambda config: Means())


def upscale_of(method: str) -> Method:
    (variant,) = variants(parse_config({"name": "d"}), method, "4x4")
    return variant.config.upscale


# ------------------------------------------------------------------------------------------------- which datasets


def test_methods_and_scales_become_datasets_of_their_own() -> None:
    config = parse_config({"name": "d", "quality": {"features": "none"}, "limit": 3})
    found = variants(config, "multidiffusion, resmaster+sg,resmaster-etp", "2x2,4x4")
    assert [variant.config.name for variant in found] == [
        "d-multidiffusion-2x2",
        "d-resmaster_sg-2x2",
        "d-resmaster-etp-2x2",
        "d-multidiffusion-4x4",
        "d-resmaster_sg-4x4",
        "d-resmaster-etp-4x4",
    ]
    assert {variant.config.quality.features for variant in found} == {"picturebook"}
    assert {variant.config.limit for variant in found} == {3}
    assert [variant.config.upscale.scale for variant in found] == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("method", "switches"),
    [
        ("resmaster", (True, True, True)),
        ("resmaster+sg", (True, False, False)),
        ("resmaster+sg+tip", (True, True, False)),
        ("resmaster+sg+tip+etp", (True, True, True)),
        ("resmaster-tip", (True, False, True)),
        ("resmaster-sg-etp", (False, True, False)),
    ],
)
def test_switches(method: str, switches: tuple[bool, ...]) -> None:
    upscale = upscale_of(method)
    assert (upscale.structure.enabled, upscale.image_prompt.enabled, upscale.text_prompt.enabled) == switches


def test_other_settings_keep_what_they_do_not_name() -> None:
    upscale = upscale_of("resmaster-tip:stride=0.75:structure.stop=0.5:image_prompt.scale=0.3:fuse=linear")
    assert (upscale.stride, upscale.structure.stop, upscale.fuse) == (0.75, 0.5, "linear")
    assert (upscale.image_prompt.scale, upscale.image_prompt.enabled) == (0.3, False)
    assert upscale_of("resmaster:structure.preset=paper").structure.cutoff_units == "hr_nyquist"


def test_many_settings_have_a_name_that_is_not_too_long() -> None:
    base = parse_config({"name": "picturebook-evaluation"})
    texts = [
        f"resmaster:preset=exact:structure.preset=lr_nyquist:stride=0.75:shift=every_step:steps={n}" for n in (5, 6)
    ]
    names = [each.config.name for each in variants(base, ",".join(texts), "4x4")]
    assert len({*names}) == 2
    for name in names:
        assert len(name) == 100
        assert name.startswith("picturebook-evaluation-resmaster_preset_exact_")
        assert name.endswith("-4x4")


def test_a_preset_is_that_of_the_row_whatever_the_configurations_own_is() -> None:
    base = parse_config({"name": "d", "upscale": {"steps": 20, "fuse": "uniform"}})
    default, exact = (each.config.upscale for each in variants(base, "resmaster,resmaster:preset=exact", "2x2"))
    assert (default.stepper, default.start, default.steps, default.fuse) == ("dpmpp_2m", 0.3, 20, "uniform")
    assert (exact.stepper, exact.start, exact.steps, exact.shift) == ("ddim_implied", 0.0, 20, "none")
    turned = parse_config({"name": "d", "upscale": {"preset": "exact"}})
    again, other = (each.config.upscale for each in variants(turned, "resmaster:preset=default,direct", "2x2"))
    assert again.stepper == "dpmpp_2m"
    assert other == parse_config({"name": "d", "upscale": {"method": "direct", "scale": 2}}).upscale


def test_what_nobody_set_is_for_each_methods_preset_to_say() -> None:
    base = parse_config({"name": "d", "upscale": {"steps": 7, "guidance_scale": 3.0}})
    [scalecrafter, c_upscale] = (each.config.upscale for each in variants(base, "scalecrafter,c_upscale", "2x2"))
    assert (scalecrafter.stepper, scalecrafter.steps, scalecrafter.guidance_scale) == ("ddim_ancestral", 7, 3.0)
    assert c_upscale.structure.cutoff_units == "lr_nyquist"


@pytest.mark.parametrize(
    ("methods", "scales", "culprit"),
    [
        ("magic", "2x2", "unknown method 'magic'"),
        ("resmaster+sgg", "2x2", "no switch 'sgg'"),
        ("direct+sg", "2x2", "no switch 'sg'"),
        ("resmaster:stride", "2x2", "key=value"),
        ("resmaster:strid=1", "2x2", "strid"),
        ("Res Master", "2x2", "write a method"),
        ("direct,direct", "2x2", "d-direct-2x2"),
        ("direct", "2", "height x width"),
        ("direct", "0x2", "height x width"),
        ("direct", " , ", "--scales"),
    ],
)
def test_mistakes_are_one_line_that_names_the_culprit(methods: str, scales: str, culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit.replace("+", r"\+")) as error:
        variants(parse_config({"name": "d"}), methods, scales)
    assert "\n" not in str(error.value)


def test_low_res_images_have_the_targets_shape_and_about_the_native_area() -> None:
    assert low_res_size(4, 4, 128, 8) == (128, 128)
    assert low_res_size(2, 4, 128, 8) == (88, 176)
    assert low_res_size(4, 2, 128, 8) == (176, 88)
    assert low_res_size(2, 4, 1024, 8) == (728, 1456)
    for rows in range(1, 9):
        for cols in range(1, 9):
            config = at_scale(parse_config({"name": "d"}), f"{rows}x{cols}")
            height, width = check_sizes(config)
            assert height * cols == width * rows
            assert round(height * config.upscale.scale) == 128 * rows
            assert round(width * config.upscale.scale) == 128 * cols


def test_images_of_the_user_keep_their_size(tmp_path: Path) -> None:
    config = parse_config({"name": "d", "images": str(tmp_path)})
    sized = at_scale(config, "3x3")
    assert (sized.upscale.scale, sized.low_res.height) == (3, None)
    with pytest.raises(ConfigError, match="keep their shape"):
        at_scale(config, "2x4")


# ------------------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("method", methods())
def test_the_cost_is_what_a_real_unet_counts(method: str) -> None:
    from resmaster_stages.methods.upscale import upscale_image
    from resmaster_stages.models.parts import Models
    from tests.tiny_models import counted, tiny_adapted

    models = Models.from_pipeline(tiny_adapted())
    values = {"steps": 2, "scale": 2, "view_batch": 4, "micro_conditioning": "native"}
    config = Method.model_validate(with_method(values, method))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8))
    with counted(models.base.denoiser) as shapes, counting() as cost:
        upscale_image(models, image, "a boat", config=config)
    assert bool(shapes) == config.base_model
    assert (cost.calls, cost.rows) == (len(shapes), sum(shape[0] for shape in shapes))
    native = models.geometry.native**2
    assert cost.native_rows == pytest.approx(sum(n * h * w for n, _, h, w in shapes) / native)


# ------------------------------------------------------------------------------------------------------ low-res bytes


def commit_all(dataset: Dataset) -> None:
    for stage, shards in pending(dataset).items():
        for shard in shards:
            process = quality if stage == "quality" else FAKES[stage]
            run_stage(dataset, stage, shard, process=process)


def quality(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample, output in zip(samples, fake_stages.quality(config, samples)):
        assert sample.low_res
        assert sample.high_res
        if f"bad {config.upscale.method}" in sample.prompt:
            yield Output(sample.key, error=SampleError("told to fail"))
            continue
        arrays = {
            f"{name}.{view}": values
            for name, image in (("high_res", sample.high_res), ("low_res", sample.low_res))
            for view, values in image_features(Means(), image.open(), sample.key, 16).items()
        }
        yield Output(sample.key, rows=output.rows, arrays=arrays)


def test_low_res_shards_are_copied_where_they_would_be_the_same(tmp_path: Path, fakes: None) -> None:
    prompts = ["a", "b", "bad low_res"]
    one = planned(tmp_path, prompts, tmp_path, name="one", quality={"features": "clip"})
    commit_all(one)
    two = planned(tmp_path, prompts, tmp_path, name="two", upscale={"method": "direct"})
    assert share_low_res(one, two) == 1, "the shard with a failed sample is left to the target"
    assert share_low_res(one, two) == 0
    assert pending(two)["low_res"] == [1]
    run_stage(two, "low_res", 1, process=FAKES["low_res"])
    found = [d.commits("low_res").read_all() for d in (one, two)]
    for shard in (0, 1):
        a, b = found[0][shard].objects[0], found[1][shard].objects[0]
        assert (a.sha256, a.bytes) == (b.sha256, b.bytes)
    assert found[1][0].provenance["copied_from"] == f"one/{found[0][0].objects[0].name}"
    run_stage(two, "high_res", 0, process=no_captions)
    for change in ({"seed": 1}, {"low_res": {"height": 16, "width": 16, "steps": 7}}):
        other = planned(tmp_path, prompts, tmp_path, **{"name": f"other{len(change)}{next(iter(change))}", **change})
        assert share_low_res(one, other) == 0, change


def no_captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        assert sample.low_res
        assert sample.low_res.open().size == (16, 16)
        count_call(8, 0.5)
        count_call(8, 0.5)
        yield Output(sample.key, files=fake_stages.files_of(sample, 64))


# ------------------------------------------------------------------------------------------------------ whole thing


def compare(config: DatasetConfig, build: Build, **asked: Any) -> Comparison:
    """With the tables printed, as the command line does."""
    asked = {"methods": "direct,resmaster", "scales": "2x2,4x4", **asked}
    found = comparing.compare(config, build=build, **asked)
    print_tables(found.measured)
    return found


def build(config: DatasetConfig) -> bool:
    dataset = planned_dataset(config)
    for stage, shards in pending(dataset).items():
        for shard in shards:
            uses = dataset.config.upscale.uses("captions")
            process = {**FAKES, "quality": quality, "high_res": FAKES["high_res"] if uses else no_captions}[stage]
            run_stage(dataset, stage, shard, process=process)
    write_manifest(dataset)
    write_report(dataset)
    return True


def test_a_comparison_is_datasets_a_table_a_page_and_sheets(
    tmp_path: Path, fakes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(["p1", "p2", "p3", "p4", "bad direct"]))
    config = parse_config(
        {
            "name": "d",
            "root": str(tmp_path / "out"),
            "prompts": str(tmp_path / "prompts.txt"),
            "samples_per_shard": 3,
            "image_format": "png",
            "model": {"id": "tiny"},
            "upscale": {"steps": 5, "view_batch": 100},
        }
    )
    read = comparing._manifest

    def with_one_flagged(dataset: Dataset) -> dict[str, dict[str, Any]]:
        found = read(dataset)
        next(iter(found.values()))["flags"] = ["border", "colour"]
        return found

    monkeypatch.setattr(comparing, "_manifest", with_one_flagged)
    looks: list[str] = []

    def counting(config: DatasetConfig) -> bool:
        looks.append(config.name)
        return build(config)

    found = compare(config, counting)
    assert (found.finished, found.page) == (True, f"{tmp_path}/out/d-compare/compare.md")
    assert looks == ["d-direct-2x2", "d-resmaster-2x2", "d-direct-4x4", "d-resmaster-4x4"]
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["4x4,", "n", "=", "4", "direct", "resmaster"] in lines
    assert ["UNet", "calls", "2", "1"] in lines
    folder = tmp_path / "out" / "d-compare"
    rows = pq.read_table(folder / "compare.parquet").to_pylist()
    assert [(row["scale"], row["method"], row["samples"]) for row in rows] == [
        ("2x2", "direct", 4),
        ("2x2", "resmaster", 4),
        ("4x4", "direct", 4),
        ("4x4", "resmaster", 4),
    ], "only what all methods have"
    direct, resmaster = rows[2:]
    assert direct["fid_r"] is not None
    assert direct["kid_u_low"] is not None
    assert direct["fid_c"] is None, "against low-res images there are no native-size crops"
    assert (direct["agreement_psnr"], direct["clip_score"], direct["repeat_rate"]) == (30.0, None, None)
    assert (direct["seam_worst"], direct["flagged"]) == (0.0, 0.25), "one of four has flags"
    assert (direct["unet_calls"], direct["unet_rows"], direct["unet_native_rows"]) == (2, 16, 8)
    assert (resmaster["unet_calls"], resmaster["unet_rows"]) == (1, 4)
    page = (folder / "compare.md").read_text()
    assert "| direct |" in page
    assert "![" in page
    for scale in ("2x2", "4x4"):
        assert Image.open(folder / f"sheet-{scale}.png").width > 700
        assert (folder / f"chart-{scale}.svg").read_text().startswith("<svg ")
        assert f"(chart-{scale}.svg)" in page
    shas = set()
    for name in looks:
        dataset = open_dataset(str(tmp_path / "out" / name))
        receipts = dataset.commits("low_res").read_all()
        shas.add(tuple(receipt.objects[0].sha256 for receipt in receipts.values()))
    assert len(shas) == 1, "the same low-res images for all"

    looks_at = looks[2]
    looks.clear()
    assert compare(config, counting).finished
    assert looks == [], "nothing was left to do"
    assert pq.read_table(folder / "compare.parquet").to_pylist() == rows
    manifest = tmp_path / "out" / looks_at / "manifest.parquet"
    whole = manifest.read_bytes()
    pq.write_table(pq.read_table(manifest).slice(0, 2), manifest)  # killed before it was published
    assert compare(config, counting).finished
    assert looks == [looks_at]
    assert manifest.read_bytes() == whole
    looks.clear()
    changed = config.model_copy(update={"upscale": config.upscale.model_copy(update={"steps": 6})})
    assert compare(changed, counting, scales="4x4").finished
    assert len(looks) == 2
    looks.clear()
    assert compare(config, counting, scales="4x4").finished
    assert len(looks) == 2, "committed already, but the manifests are of the other configuration"
    assert [row["unet_calls"] for row in pq.read_table(folder / "compare.parquet").to_pylist()] == [2, 1]
    fewer = config.model_copy(update={"limit": 2})
    assert compare(fewer, counting, scales="4x4").finished
    assert [row["samples"] for row in pq.read_table(folder / "compare.parquet").to_pylist()] == [2, 2]


def test_input_that_one_of_the_methods_cannot_use_ends_it_before_the_first_build(tmp_path: Path, fakes: None) -> None:
    (tmp_path / "mask.png").write_bytes(png((255, 255, 255)))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "p", "detail_mask": "mask.png"}) + "\n")
    own = {"name": "d", "root": str(tmp_path / "out"), "prompts": str(tmp_path / "p.jsonl"), "model": {"id": "tiny"}}
    begun: list[DatasetConfig] = []
    with pytest.raises(ConfigError, match="detail mask, which only method freescale"):
        comparing.compare(parse_config(own), "freescale,direct", "2x2", lambda config: begun.append(config) is None)
    assert begun == []


@pytest.mark.parametrize("status", [0, 1])
def test_the_verb_prints_tables_and_where_the_page_is(
    status: int, tmp_path: Path, fakes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status of a build that lacks shards is the comparison's; what is there is compared."""

    def execute(console: Console, flow: Callable[[], object]) -> int:
        flow()
        return status

    monkeypatch.setattr("resmaster_flows.cli.compare.execute", execute)
    monkeypatch.setattr("resmaster_flows.calls.call", lambda flow, config, **options: build(config))
    (tmp_path / "prompts.txt").write_text("p1\np2\n")
    own = {"name": "d", "root": str(tmp_path / "out"), "prompts": "prompts.txt", "model": {"id": "tiny"}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(own))
    assert main(["compare", str(tmp_path / "d.yaml"), "--methods", "direct", "--scales", "2x2"]) == status
    out, error = capsys.readouterr()
    assert "2x2, n = 2" in out
    assert out.endswith(f"comparison: {tmp_path}/out/d-compare/compare.md\n")
    assert "2 samples in 1 shards" in error


def test_a_reference_of_the_users_own_images(tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    for number in range(3):
        (tmp_path / "real" / f"{number}.png").write_bytes(png((number * 40, 0, 9), (40, 30)))
    config = parse_config({"name": "d", "quality": {"features": "clip"}})
    cache = open_root(str(tmp_path / "cache"))
    found = reference_features(config, str(tmp_path / "real"), cache)
    assert stacked(found)["c"].shape == (3, 10, 6)
    monkeypatch.setattr(
        "resmaster_stages.evaluation.reference.image_features", lambda *args: pytest.fail("computed again")
    )
    again = stacked(reference_features(config, str(tmp_path / "real"), cache))
    assert all(np.array_equal(again[view], values) for view, values in stacked(found).items())
    (tmp_path / "real" / "0.png").write_bytes(b"no image")
    monkeypatch.setattr("resmaster_stages.evaluation.reference.image_features", image_features)
    with pytest.raises(UserError, match=r"--reference .*0\.png: not a readable image"):
        reference_features(config, str(tmp_path / "real"), cache)
    (tmp_path / "real" / "0.png").unlink()
    (tmp_path / "real" / "0.txt").symlink_to("/etc/hostname")
    (tmp_path / "real" / "0.png").write_bytes(png((1, 2, 3), (40, 30)))
    with pytest.raises(UserError, match=r"--reference .*0\.png: 0\.txt is a link that leads out .*; remove or mend it"):
        reference_features(config, str(tmp_path / "real"), cache)


def test_ground_truth_is_every_prompt_drawn_at_the_target_size(
    tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red house on the sand at night\ntwo cats: a blue cat and a pink cat\n")
    monkeypatch.setattr("resmaster_stages.evaluation.reference.TRUE_IMAGES", 3)
    for module in ("reference", "compare"):
        name = f"resmaster_stages.evaluation.{module}.object_counter"
        monkeypatch.setattr(name, lambda config: lambda image: {"house": 3})
    config = parse_config(
        {
            "name": "d",
            "root": str(tmp_path / "out"),
            "prompts": str(tmp_path / "prompts.txt"),
            "image_format": "png",
            "model": {"id": "tiny"},
            "quality": {"features": "picturebook"},
        }
    )
    assert compare(config, build, scales="2x2", reference="picturebook").finished
    folder = tmp_path / "out" / "d-compare"
    rows = pq.read_table(folder / "compare.parquet").to_pylist()
    assert [row["method"] for row in rows] == ["direct", "resmaster", "(real images)"]
    assert {(row["height"], row["width"], row["reference_samples"]) for row in rows} == {(64, 64, 4)}
    assert rows[2]["fid_c"] is not None
    assert rows[2]["unet_calls"] is None
    assert [(row["repeat_rate"], row["repeat_surplus"]) for row in rows] == [(0.5, 1.0)] * 3
    assert "(real images)" in capsys.readouterr().out
    cache = open_root(str(tmp_path / "cache"))
    (variant,) = variants(config, "direct", "2x2")
    reference, real = true_features(variant.config, 32, 32, cache)
    assert (len(reference), len(real)) == (4, 2)
    assert not set(reference) & set(real)
    monkeypatch.setattr(
        "resmaster_stages.evaluation.reference.image_features", lambda *args: pytest.fail("computed again")
    )
    again, _ = true_features(variant.config, 32, 32, cache)
    assert all(np.array_equal(again[key]["r"], values["r"]) for key, values in reference.items())


class Pixels:
    """An extractor whose one layer is the image."""

    input_px = 4

    def layers(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        return [np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in images])]


def drawn_config(tmp_path: Path, lines: str, **values: Any) -> DatasetConfig:
    (tmp_path / "prompts.txt").write_text(lines)
    own = {"name": "d", "root": str(tmp_path / "out"), "prompts": str(tmp_path / "prompts.txt"), "image_format": "png"}
    return parse_config({**own, "model": {"id": "tiny"}, "quality": {"features": "picturebook"}, **values})


def test_drawn_low_res_images_have_a_true_enlargement_and_the_distance_from_it_is_a_column(
    tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`direct` is made to give the truth itself, and `lanczos` is the method: their distances are 0 and more."""
    pytest.importorskip("resvg_py")
    from resmaster_stages import high_res as upscale
    from resmaster_stages import low_res

    config = drawn_config(tmp_path, "a red house on the sand at night\ntwo cats: a blue cat and a pink cat\n")
    monkeypatch.setattr("resmaster_stages.metrics.features.load_classifier", lambda folder, device: Pixels())
    looks: list[str] = []

    def the_truth(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            yield Output(sample.key, files={"png": encoded(true_enlargement(sample.prompt, 64, 64)), "json": b"{}"})

    def build(config: DatasetConfig) -> bool:
        looks.append(config.name)
        dataset = planned_dataset(config)
        for stage, shards in pending(dataset).items():
            for shard in shards:
                high_res = upscale.process if config.upscale.method == "lanczos" else the_truth
                process = {"low_res": low_res.process, "high_res": high_res, "quality": quality}[stage]
                with counting():
                    run_stage(dataset, stage, shard, process=process)
        write_manifest(dataset)
        write_report(dataset)
        return True

    asked = {"methods": "direct,lanczos", "scales": "4x4", "low_res": "drawn"}
    assert compare(config, build, **asked).finished
    assert looks == ["d-drawn-direct-4x4", "d-drawn-lanczos-4x4"]
    folder = tmp_path / "out" / "d-drawn-compare"
    direct, lanczos = pq.read_table(folder / "compare.parquet").to_pylist()
    assert direct["perceptual_distance"] == 0
    assert lanczos["perceptual_distance"] > 0.001
    assert (direct["samples"], direct["height"], direct["width"]) == (2, 64, 64)
    assert "distance ↓" in capsys.readouterr().out
    assert "| distance ↓ |" in (folder / "compare.md").read_text()
    for sample in finished_samples(open_dataset(str(tmp_path / "out" / looks[1])), [direct_key(tmp_path, 0)]):
        assert sample.low_res.tobytes() == true_image(sample.prompt, 16, 16, REPLICA).tobytes()
    (tar,) = folder.glob("drawn-16x16-*.tar")
    written = tar.stat().st_mtime_ns
    looks.clear()
    assert compare(config, build, **asked).finished
    assert (looks, tar.stat().st_mtime_ns) == ([], written), "nothing was left to do"


def direct_key(tmp_path: Path, place: int) -> str:
    dataset = open_dataset(str(tmp_path / "out" / "d-drawn-direct-4x4"))
    return list(read_plan(dataset.folder).read(0))[place].key


def encoded(image: Image.Image) -> bytes:
    return encode_image(image, "png")


def test_a_drawing_and_its_true_enlargement_are_one_scene_and_none_of_the_reference() -> None:
    pytest.importorskip("resvg_py")
    prompt = "a red house and a yellow cat on the sand at night"
    small = true_image(prompt, 88, 176, REPLICA)
    assert agreement(true_enlargement(prompt, 256, 512), small)[0] > 28
    for replica in range(3):
        assert agreement(true_image(prompt, 256, 512, replica), small)[0] < 22


@pytest.mark.parametrize(
    ("prompts", "values", "said"),
    [
        ("a photograph of a whale", {}, "names nothing of its world"),
        ("a red cat", {"replicas": 2}, "replicas: 1"),
        ("a red cat", {"images": "somewhere", "prompts": None}, "your own images"),
    ],
)
def test_what_cannot_be_drawn_small_is_said_before_anything_is_built(
    tmp_path: Path, fakes: None, prompts: str, values: dict[str, Any], said: str
) -> None:
    config = drawn_config(tmp_path, prompts, **values)
    with pytest.raises(ConfigError, match=said) as error:
        compare(config, build, methods="lanczos", low_res="drawn")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_drawing_takes_no_detail_mask(tmp_path: Path, fakes: None) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "mask.png").write_bytes(png((9, 9, 9)))
    (tmp_path / "prompts.csv").write_text("prompt,detail_mask\na red cat,mask.png\n")
    masked = {"method": "freescale", "alpha_elsewhere": 0.5}
    config = drawn_config(tmp_path, "", prompts=str(tmp_path / "prompts.csv"), upscale=masked)
    with pytest.raises(ConfigError, match="no detail mask"):
        compare(config, build, methods="freescale", low_res="drawn")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("a photograph of a whale", "names nothing of its world"),
        ("a red cat, a blue cat, a pink cat and a white cat", "4 objects"),
    ],
)
def test_what_has_no_ground_truth_is_said_before_anything_is_built(
    tmp_path: Path, fakes: None, prompts: str, said: str
) -> None:
    (tmp_path / "prompts.txt").write_text(prompts)
    config = parse_config(
        {
            "name": "d",
            "root": str(tmp_path / "out"),
            "prompts": str(tmp_path / "prompts.txt"),
            "model": {"id": "tiny"},
            "quality": {"features": "picturebook"},
        }
    )
    with pytest.raises(ConfigError, match=said):
        compare(config, build, scales="2x2", reference="picturebook")
    assert not (tmp_path / "out").exists()


def test_a_sheet_shows_every_method_at_the_same_place() -> None:
    low = Image.new("RGB", (16, 32), "white")
    high = Image.new("RGB", (64, 128), "white")
    high.paste(Image.effect_noise((16, 16), 90), (40, 100))
    page = sheet([SheetRow("a prompt", low, {"a": low.resize((64, 128)), "b": high})], ["a", "b"])
    cells = [np.asarray(page)[290:, 8 + place * 136 : 8 + place * 136 + 128].std() for place in range(3)]
    assert cells[2] > 20 > max(cells[:2])


def test_reading_features_of_a_finished_variant(tmp_path: Path, fakes: None) -> None:
    dataset = planned(tmp_path, ["a", "b"], tmp_path, quality={"features": "clip"})
    commit_all(dataset)
    keys = [sample.key for sample in read_plan(dataset.folder).read(0)]
    assert list(read_features(create_or_open(dataset.config), "low_res")) == keys


def test_the_commands_in_the_documentation_are_understood() -> None:
    root = ROOT
    pages = [(root / "docs" / f"evaluation-{page}.md").read_text() for page in ("protocol", "results")]
    text = re.sub(r"\s*\\\n\s*", " ", "".join(pages))
    counts = []
    for command in [line for line in text.splitlines() if line.startswith("resmaster compare ")]:
        args = parser().parse_args(shlex.split(command)[1:])
        found = variants(load_config(root / args.config), args.methods, args.scales)
        for variant in found:
            check_sizes(variant.config)
        counts.append((len(found), args.limit))
    assert counts == [
        (15, 64),
        (13, 64),
        (18, 32),
        (14, 64),
        (8, 32),
        (5, 32),
        (4, 64),
        (3, 64),
        (5, 64),
        (9, 64),
        (3, 64),
        (6, 32),
    ]
