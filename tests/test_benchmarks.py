"""The benchmarks of the methods run, and their numbers are those of the work."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import flags, image_formats, methods, peers, true_scenes
from resmaster_stages.config import method
from resmaster_stages.config.load import load_config
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.metrics.metric import Pair
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.picturebook import captions
from resmaster_stages.picturebook.scenes import drawing
from resmaster_stages.picturebook.training.evaluate import square_scenes
from resmaster_stages.planning.checks import check_sizes
from resmaster_stages.quality import measure
from resmaster_stages.storage.images import encode_image
from tests.checkout import ROOT

Run = Callable[..., list[dict[str, str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs it with some options: the rows of the table that it prints, by heading."""

    def rows(*words: str, main: Callable[[list[str]], None] = methods.main) -> list[dict[str, str]]:
        main(list(words))
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert set(lines[1]) <= {"---", "---:"}
        return [dict(zip(lines[0], [cell.strip() for cell in line])) for line in lines[2:]]

    return rows


@pytest.mark.slow
def test_picturebook_side_by_side(run: Run) -> None:
    rows = run("--scales", "1.25", "--steps", "2")
    assert [row["method"] for row in rows] == list(method.methods())
    by_method = {row["method"]: row for row in rows}
    assert by_method["direct"]["UNet calls, 1.25x"] == "2"
    assert by_method["direct"]["native rows, 1.25x"] == "6"  # 2 steps x 2 branches x 1.25 squared
    assert by_method["multidiffusion"]["native rows, 1.25x"] == "16"  # 2 steps x 2 branches x 4 views
    assert by_method["super_resolution"]["UNet calls, 1.25x"] == "0"
    assert all(float(row["seconds, 1.25x"]) >= 0 for row in rows)
    if methods.CLEAR.exists():
        assert all(float(row["peak GB, 1.25x"]) > 0.1 for row in rows)


@pytest.mark.slow
def test_presets_side_by_side_and_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    methods.main(["--methods", "resmaster:exact,resmaster:default", "--scales", "1.25", "--parts"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table, parts = lines[:4], lines[4:]
    rows = [dict(zip(table[0], cells)) for cells in table[2:]]
    assert [row["native rows, 1.25x"] for row in rows] == ["160", str(11 * 4 * 2 + 7 * 4)]
    assert parts[0] == ["method", "scale", "image prompts", "text", "VAE encoder", "UNet", "VAE decoder", "rest"]
    for cells, row in zip(parts[2:], rows):
        shares = [float(cell.rstrip("%")) for cell in cells[2:]]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert round(shares[3]) == pytest.approx(float(row["UNet share, 1.25x"].rstrip("%")), abs=1)
        assert shares[3] == max(shares)


@pytest.mark.slow
def test_an_sdxl_of_random_weights_and_counted_operations(run: Run) -> None:
    """The part for GPUs, on a CPU: the same code with SDXL's channels divided by 20."""
    some = "direct,resmaster:exact,scalecrafter,freescale"
    rows = run("--model", "sdxl", "--shrink", "16", "--methods", some, "--scales", "2", "--steps", "2", "--flops")
    assert [row["method"] for row in rows] == some.split(",")
    assert rows[0]["native rows, 2x"] == "16"  # 2 steps x 2 branches x 4
    assert rows[1]["native rows, 2x"] == "36"
    assert all(row["Tflop/s, 2x"] for row in rows)


@pytest.mark.slow
def test_the_peer_draws_the_same_image_with_more_calls(run: Run) -> None:
    rows = run("--shrink", "16", "--scale", "2", "--steps", "2", "--rounds", "1", main=peers.main)
    assert [row["UNet calls"] for row in rows] == ["2", "18", "2"]
    assert all(int(row["greatest difference of a pixel"]) <= 1 for row in rows)
    assert rows[0]["ratio"] == "1.00"
    assert all(float(row["ratio"]) > 0 for row in rows)


@pytest.mark.slow
def test_planted_faults_raise_their_flags_and_clean_images_none(run: Run) -> None:
    rows = {row["images"]: row for row in run("--n", "2", main=flags.main)}
    assert list(rows) == [*flags.CLEAN, *flags.FAULTS]
    assert {rows[name]["any of these"] for name in flags.CLEAN} == {"0%"}
    assert all(rows[name]["should raise"] == flag for name, (flag, _) in flags.FAULTS.items())
    assert {rows[name]["samples"] for name in flags.CLEAN} == {"2"}
    for name in ("foreign rectangle, a view", "object smeared", "object repeated", "25 grey levels off, all"):
        assert rows[name][flags.FAULTS[name][0]] == "100%"


def test_a_dataset_is_measured_as_the_stage_measures_it(tmp_path: Path) -> None:
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    sample: dict[str, Any] = {"key": "aa"}
    for name, size in (("low_res", 32), ("high_res", 128)):
        image.resize((size, size)).save(tmp_path / f"{name}.png")
        data = (tmp_path / f"{name}.png").read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(b"before" + data + b"after")
        sample |= {f"{name}_object": f"{name}.tar", f"{name}_offset": 6, f"{name}_bytes": len(data)}
    pq.write_table(pa.Table.from_pylist([sample]), tmp_path / "manifest.parquet")
    (row,) = flags.of_dataset(tmp_path, native_px=32)
    boxes = view_grid(Geometry(32, 8), 128, 128, 0.5).pixel_boxes
    assert row == {"key": "aa", **measure(Pair(image.resize((32, 32)), image, boxes))}


@pytest.mark.slow
def test_parts_of_a_method_are_exchanged_for_the_truth_and_finished_images_are_kept(run: Run, tmp_path: Path) -> None:
    short = "resmaster:steps=3"
    words = ("--n", "2", "--out", str(tmp_path), "--methods", f"lanczos,{short},{short}@true")
    rows = run(*words, main=true_scenes.main)
    assert [row["row"].strip("`") for row in rows] == [
        *words[-1].split(","),
        true_scenes.VAE,
        true_scenes.REDRAWN,
        "the drawings",
    ]
    by_name = {row["row"].strip("`"): row for row in rows}
    assert by_name["lanczos"]["rows"] == "0" != by_name[short]["rows"] == by_name[short + "@true"]["rows"]
    distances = {name: float(row["distance ↓"].split(" ± ")[0]) for name, row in by_name.items()}
    assert distances["the drawings"] == 0 < distances[true_scenes.VAE] < distances["lanczos"]
    assert distances[true_scenes.REDRAWN] > distances[true_scenes.VAE]
    assert by_name["the drawings"]["pairs ↑"] >= by_name[short]["pairs ↑"]
    assert len(list(tmp_path.glob("*/*/*.png"))) == 3 * 2
    bands = np.arange(512)[:, None] // 64 % 2 * 40 + np.random.default_rng(1).integers(80, 90, (512, 512))
    for path in tmp_path.glob("*/*lanczos*/*.png"):
        Image.fromarray(bands.astype(np.uint8)).save(path)  # steps where views end
    again = run(*words, main=true_scenes.main)[0]
    assert again["distance ↓"] != rows[0]["distance ↓"], "finished images are read"
    assert float(again["seam"]) > 2 > 1.2 > float(rows[0]["seam"])


def test_the_methods_of_the_tables_are_understood() -> None:
    page = (ROOT / "docs" / "evaluation-results.md").read_text()
    named = re.findall(r"^python benchmarks/true_scenes.py .*--methods \\\n(\S+)$", page, re.MULTILINE)
    assert len(named) == 2
    for text in ",".join([true_scenes.METHODS, *named]).split(","):
        (variant,) = variants(load_config(true_scenes.CONFIG), text.removesuffix("@true"), "4x4")
        check_sizes(variant.config)
        assert variant.config.upscale.uses("captions") or not text.endswith("@true")


def test_the_error_of_a_figure_without_each_scene_in_turn() -> None:
    values = np.random.default_rng(1).normal(size=9)
    means = np.array([values.mean(), *(np.delete(values, n).mean() for n in range(9))])
    assert true_scenes.jackknife(means) == pytest.approx(values.std(ddof=1) / 3)  # that of a mean


def test_fid_without_each_scene_in_turn() -> None:
    rng = np.random.default_rng(2)
    drawn = [rng.normal(size=(16, 3)) for _ in range(4)]
    made = [*drawn[:3], drawn[3] + 5]
    found = true_scenes.fids(made, drawn)
    assert found.shape == (5,)
    assert found[4] == pytest.approx(0, abs=1e-9)  # all but the one that was moved are equal
    assert found[:4].min() > 0.1


def test_a_redrawn_scene_has_its_things_in_their_places_and_other_details() -> None:
    for scene in square_scenes(4, true_scenes.FIRST_SCENE):
        other = true_scenes.redrawn(scene)
        assert [replace(each, seed=0) for each in other.things] == [replace(each, seed=0) for each in scene.things]
        assert replace(other, seed=0, things=()) == replace(scene, seed=0, things=())
        assert other.seed != scene.seed
        for now, before in zip(other.things, scene.things):
            assert now.seed != before.seed
            if now.kind not in ("bird", "boat"):  # these leave little to chance
                assert drawing(now).svg != drawing(before).svg


def test_a_view_is_told_what_it_shows() -> None:
    scene = square_scenes(1, true_scenes.FIRST_SCENE)[0]
    (variant,) = variants(load_config(true_scenes.CONFIG), "resmaster", "4x4")
    texts = true_scenes.true_captions(scene, SimpleNamespace(geometry=Geometry(128, 8)), variant.config, 512, 512)  # type: ignore[arg-type]
    boxes = view_grid(Geometry(128, 8), 512, 512, variant.config.upscale.view_stride).pixel_boxes
    assert len(texts) == len(boxes)
    for text, (y0, x0, y1, x1) in zip(texts, boxes):
        assert captions.pairs(text) == captions.pairs_in(scene, (x0, y0, x1, y1))


def test_true_captions_are_for_methods_that_read_captions(tmp_path: Path) -> None:
    for text, message in (("lanczos@true", "reads no captions"), ("resmaster@best", "write @true")):
        with pytest.raises(SystemExit, match=message):
            true_scenes.main(["--n", "1", "--out", str(tmp_path), "--methods", text])


def test_what_image_formats_cost(run: Run, tmp_path: Path) -> None:
    image = Image.merge("RGB", [Image.effect_noise((64, 48), 60) for _ in range(3)]).resize((256, 192))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("no image")
    rows = {row["format and quality"]: row for row in run(str(tmp_path), "--edge-px", "128", main=image_formats.main)}
    assert {name for name, row in rows.items() if row["PSNR"] == "none"} == {"PNG", "WebP 100", "JPEG XL 100"}
    assert all(int(row["greatest error of 255"]) > 0 for row in rows.values() if row["PSNR"] != "none")
    small = image.resize((128, 96), Image.Resampling.LANCZOS)
    assert float(rows["PNG"]["bytes per px"]) == pytest.approx(len(encode_image(small, "png")) / (128 * 96), abs=1e-3)
