"""The pack's measures: aims from below and from above, the paired measure on images whose answer is known, the
card."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ResNetForImageClassification

from resmaster_stages.config.load import load_config
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.methods.resmaster import FEWER_ROWS
from resmaster_stages.metrics.features import load_classifier
from resmaster_stages.picturebook import captions
from resmaster_stages.picturebook.training import evaluate, paired
from resmaster_stages.picturebook.training.evaluate import Amounts, Measure
from resmaster_stages.picturebook.training.export import PACK
from resmaster_stages.picturebook.training.paired import Judge, Judged, TrueScenes
from tests.checkout import ROOT
from tests.methods.common import lanczos as enlarge

CARD = json.loads((PACK / "card.json").read_text())


# ------------------------------------------------------------------------------------------------------------ aims


@pytest.mark.parametrize(
    ("value", "aim", "at_most", "met"),
    [
        (0.5, 0.5, False, True),
        (0.4999, 0.5, False, False),
        (1.25, 1.25, True, True),
        (1.2501, 1.25, True, False),
        (0.1, 1.25, True, True),
        (math.nan, 0.5, False, False),
        (math.nan, 0.5, True, False),
        (7.0, None, False, None),
    ],
)
def test_an_aim_is_a_lower_or_an_upper_bound(value: float, aim: float | None, at_most: bool, met: bool | None) -> None:
    measure = Measure("m", value, aim, at_most)
    assert measure.met is met
    text = str(measure)
    assert ("NOT MET" in text) is (met is False)
    assert ("<=" in text) is (aim is not None and at_most)
    assert ("aim" in text) is (aim is not None)


def test_the_card_keeps_which_bound_an_aim_is() -> None:
    assert Measure("a", 0.123456, 0.5).recorded() == {"value": 0.1235, "aim": 0.5}
    assert Measure("b", 2.0, 1.25, at_most=True).recorded() == {"value": 2.0, "aim": 1.25, "at_most": True}
    assert Measure("c", 2.0).recorded() == {"value": 2.0, "aim": None}
    recorded = {m.name: m.recorded() for m in (Measure("a, dB", 30.06, 28.857), Measure("b", 1.3, 1.25, at_most=True))}
    assert evaluate.measures_table(recorded).splitlines()[2:] == ["| a, dB | 30.1 | 28.9 |", "| b | 1.30 | ≤ 1.25 |"]


def test_the_page_s_table_is_the_card_s() -> None:
    page = (ROOT / "docs" / "picturebook.md").read_text()
    (table,) = re.findall(r"^\| measure \|.*?(?=\n\n)", page, flags=re.DOTALL | re.MULTILINE)
    assert table == evaluate.measures_table(CARD["measures"])


def test_measuring_replaces_the_card_s_measures_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"hardware": "a", "measures": {"old": 1}}))
    asked: list[Any] = []

    def measured(pack: Path, amounts: Amounts, device: str) -> list[Measure]:
        asked.append((pack, amounts, device))
        return [Measure("new", 1.0, 1.25, at_most=True)]

    monkeypatch.setattr(evaluate, "evaluate", measured)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--pack", str(tmp_path), "--paired", "3", "--guidance", "4"])
    evaluate.main()
    assert asked == [(tmp_path, Amounts(paired=3, guidance=4.0), "cpu")]
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["hardware"] == "a"
    assert card["measures"] == {"new": {"value": 1.0, "aim": 1.25, "at_most": True}}
    assert card["measured_on"]["paired_scenes"] == 3
    out = capsys.readouterr().out
    assert "<=   1.250   met" in out
    assert out.endswith("| new | 1.00 | ≤ 1.25 |\n")


# -------------------------------------------------------------------------------------------------- the paired measure


@pytest.fixture(scope="module")
def shown() -> TrueScenes:
    pytest.importorskip("resvg_py")
    return paired.draw(evaluate.square_scenes(3, 31))


def judge_of(read: Sequence[frozenset[tuple[str, str]]]) -> Judge:
    """The pack's classifier, and a reader that says `read`, whatever it is shown."""

    def read_pairs(images: Sequence[Image.Image]) -> Sequence[frozenset[tuple[str, str]]]:
        assert {image.size for image in images} == {(128, 128)}
        return read

    return Judge(load_classifier(PACK, "cpu"), read_pairs)


def test_the_two_drawings_are_of_one_scene(shown: TrueScenes) -> None:
    assert {image.size for image in shown.low_res} == {(128, 128)}
    assert {image.size for image in shown.drawings} == {(512, 512)}
    assert [captions.pairs(prompt) for prompt in shown.prompts] == shown.pairs
    for small, large in zip(shown.low_res, shown.drawings):
        assert paired.agreement(large, small)[0] > 30
    assert paired.agreement(shown.drawings[0], shown.low_res[1])[0] < 20


def test_the_true_drawing_is_perfect_and_enlargement_is_not(shown: TrueScenes) -> None:
    by = judge_of(shown.pairs)
    true = paired.judge(shown.drawings, shown, by)
    assert (true.distance, true.psnr, true.pairs) == (0.0, 100.0, 1.0)
    assert true.fid == pytest.approx(0.0, abs=1e-3)
    plain = paired.judge([enlarge(image, 512, 512) for image in shown.low_res], shown, by)
    assert plain.distance > 0.1
    assert plain.fid > 1
    assert plain.psnr < 40
    assert plain.agreement > true.agreement, "whoever changes nothing agrees most"


def test_pairs_matter_and_sets_do_not(shown: TrueScenes) -> None:
    by = judge_of(shown.pairs)
    moved = paired.judge([*shown.drawings[1:], shown.drawings[0]], shown, by)
    assert moved.distance > paired.judge([enlarge(i, 512, 512) for i in shown.low_res], shown, by).distance
    assert moved.fid == pytest.approx(0.0, abs=1e-3)
    assert moved.agreement < 20


def test_the_share_of_pairs_counts_what_the_scene_shows(shown: TrueScenes) -> None:
    count = sum(map(len, shown.pairs))
    none = paired.judge(shown.drawings, shown, judge_of([frozenset()] * 3))
    assert none.pairs == 0
    first = [shown.pairs[0], frozenset({("whale", "red")}), frozenset()]
    found = paired.judge(shown.drawings, shown, judge_of(first))
    assert found.pairs == pytest.approx(len(shown.pairs[0]) / count)


def judged(**values: float) -> Judged:
    return Judged(**{"distance": 1.0, "psnr": 25.0, "agreement": 30.0, "fid": 9.0, "pairs": 0.9, **values})


@pytest.mark.parametrize(
    ("ours", "drawn", "missed"),
    [
        ({"distance": 0.5}, 0.9, set()),
        ({"distance": 0.51}, 0.9, {"paired: perceptual distance (resmaster / lanczos)"}),
        (
            {"distance": 0.61},
            0.9,
            {
                "paired: perceptual distance (resmaster / lanczos)",
                "paired: perceptual distance (resmaster / super_resolution)",
            },
        ),
        ({"distance": 0.5, "agreement": 27.9}, 0.9, {"paired, resmaster: agreement in dB"}),
        ({"distance": 0.5, "pairs": 0.87}, 0.9, {"paired, resmaster: pairs found (made / drawn)"}),
        ({"distance": 0.5, "pairs": 0.87}, 0.88, set()),
    ],
)
def test_resmaster_is_held_to_its_aims_and_nobody_else(ours: dict[str, float], drawn: float, missed: set[str]) -> None:
    poor = judged(agreement=1.0, pairs=0.0)
    found = {"lanczos": poor, "super_resolution": replace(poor, distance=0.4), "resmaster": judged(**ours)}
    measures = evaluate.paired_aims(found, drawn)
    assert {measure.name for measure in measures if measure.met is False} == missed
    assert sum(measure.met is not None for measure in measures) == 4
    assert len({measure.name for measure in measures}) == len(measures)


def test_methods_are_those_of_the_evaluation_with_the_pack_s_own_networks(tmp_path: Path) -> None:
    found = {name: paired.dataset_of(tmp_path, "cpu", values) for name, values in paired.METHODS.items()}
    assert found["super_resolution"].upscale.model.startswith(str(tmp_path))
    assert {config.captions.model for config in found.values()} == {str(tmp_path / "captioner")}
    assert {config.model.id for config in found.values()} == {str(tmp_path)}
    evaluation = load_config(ROOT / "deployments" / "datasets" / "picturebook-evaluation.yaml")
    tiled = "multidiffusion:init=noised_lr:start=0.65:stride=0.75:fuse=linear"
    for name, text in (("tiled img2img", tiled), ("c_upscale", "c_upscale"), ("lanczos", "lanczos")):
        (variant,) = variants(evaluation, text, "4x4")
        assert found[name].upscale.identity() == variant.config.upscale.identity(), name
    ours = found["resmaster"].upscale
    assert {field: getattr(ours, field) for field in FEWER_ROWS} == FEWER_ROWS
    assert [name for name, config in found.items() if config.upscale.uses("captions")] == ["c_upscale", "resmaster"]


def test_captions_are_written_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    wrote: list[tuple[int, int]] = []

    def write(config: Any, prompt: str, image: Image.Image, height: int, width: int) -> list[str]:
        wrote.append((height, width))
        return [f"{prompt} {config.captions.max_new_tokens}"]

    monkeypatch.setattr(paired, "caption_views", write)
    monkeypatch.setattr(paired, "upscale_image", lambda models, image, prompt, **given: given)
    seen = {}
    for name in ("c_upscale", "lanczos"):
        config = paired.dataset_of(PACK, "cpu", paired.METHODS[name])
        seen[name] = paired.enlarged(None, config, Image.new("RGB", (128, 128)), "a cat", 5)  # type: ignore[arg-type]
    assert wrote == [(512, 512)]
    assert seen["c_upscale"]["captions"] == ["a cat 40"]
    assert seen["lanczos"]["captions"] is None
    assert seen["lanczos"]["seed"] == 5
    assert paired.dataset_of(PACK, "cpu", {"method": "resmaster"}).upscale.uses("captions")


@pytest.mark.slow
def test_the_part_of_the_evaluation_runs_on_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    few = {name: {**values, "steps": 2} if "steps" in values else values for name, values in paired.METHODS.items()}
    monkeypatch.setattr(paired, "METHODS", few)
    found = {m.name: m for m in evaluate.evaluate(amounts=Amounts(photos=64, paired=1), parts=["paired"])}
    distance = {name: found[f"paired, {name}: perceptual distance"].value for name in few}
    assert distance["super_resolution"] < distance["lanczos"]
    assert all(0 < value < 10 for value in distance.values())
    assert found["paired, drawing through the VAE: perceptual distance"].value < distance["resmaster"]
    ratio = found["paired: perceptual distance (resmaster / lanczos)"]
    assert ratio.value == pytest.approx(distance["resmaster"] / distance["lanczos"])


# ----------------------------------------------------------------------------------------------------- read as sharp


class Blurs:
    """A VAE whose latents are the image made smaller by a factor."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def encode(self, x: torch.Tensor) -> Any:
        size = x.shape[-1] // self.factor
        small = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: small))

    def decode(self, z: torch.Tensor) -> Any:
        size = z.shape[-1] * self.factor
        return SimpleNamespace(sample=F.interpolate(z, (size, size), mode="bicubic", align_corners=False))


def test_round_trips_are_read_as_sharp_as_they_are() -> None:
    """A VAE that changes nothing reads as the photos do, one that blurs 2x as photos blurred 2x."""
    pytest.importorskip("resvg_py")
    photos, made = evaluate.held_out(160)
    pixels = photos.pixels[torch.tensor([photo.render_px == 128 for photo in made])]
    classifier = ResNetForImageClassification.from_pretrained(PACK / "classifier", local_files_only=True).float().eval()
    by_factor = {
        factor: [m.value for m in evaluate.sharpness_measures(Blurs(factor), classifier, pixels)]  # type: ignore[arg-type]
        for factor in (1, 2, 4)
    }
    sharp, twice, kept = by_factor[1]
    assert sharp > 0.75
    assert twice < 0.5
    assert kept == sharp
    assert by_factor[2][2] == pytest.approx(twice, abs=0.02)
    assert by_factor[4][2] <= by_factor[2][2]
