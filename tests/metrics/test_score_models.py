"""Scores by models: tiny models of the true classes, with random weights or with weights made by hand."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from resmaster_stages.config.dataset import QualityConfig, ScoreConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.stages import hashes_of, stage_hashes
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.score_models import ScoreModel, check_score, load_score
from resmaster_stages.models.files import NotOnThisMachine
from resmaster_stages.models.identity import Weights, weights_of
from resmaster_stages.models.licences import licences_of
from resmaster_stages.planning.checks import check
from tests import tiny_scores


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_scores.classifier(folder / "classifier")
    tiny_scores.clip(folder / "clip")
    return folder


def scorer(name: str = "safety", **values: Any) -> ScoreModel:
    return load_score(name, QualityConfig(clip=None, device="cpu", **{name: values}))


def by_pil(image: Image.Image, filter: Image.Resampling, mean: float = 0.5, std: float = 0.5) -> Any:
    """[1, 3, 16, 16] of an image as a processor without crop scales it."""
    import torch

    small = np.asarray(image.resize((16, 16), filter), np.float32) / 255
    return torch.from_numpy((small - mean) / std).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------------------------------- image classifiers


def test_the_score_is_the_probability_of_the_label(models: Path) -> None:
    import torch
    from transformers import ViTForImageClassification

    place, image = str(models / "classifier"), noise_image(80, 56)
    network = ViTForImageClassification.from_pretrained(place).eval()
    with torch.inference_mode():
        logits = network(by_pil(image, Image.Resampling.BILINEAR)).logits[0].tolist()
    shares = [math.exp(value) / sum(map(math.exp, logits)) for value in logits]
    found = [scorer(model=place, label=label).score(image) for label in ("normal", "nsfw")]
    assert found == pytest.approx(shares, abs=1e-5)
    assert sum(found) == pytest.approx(1)
    assert scorer(model=place, label="nsfw").score(image) == found[1]


def with_biases(folder: Path, biases: list[float], **settings: Any) -> str:
    """A classifier whose logits are `biases`, whatever it sees."""
    from safetensors.torch import load_file, save_file

    tiny_scores.classifier(folder, tuple(f"label {number}" for number in range(len(biases))), **settings)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"].zero_()
    tensors["classifier.bias"] = tensors["classifier.bias"].new_tensor(biases)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_labels_exclude_each_other_unless_the_model_says_they_do_not(tmp_path: Path) -> None:
    biases, image = [math.log(3), 0.0, 0.0], noise_image(16, 16)
    one = with_biases(tmp_path / "one", biases)
    assert scorer(model=one, label="label 0").score(image) == pytest.approx(3 / 5)
    several = with_biases(tmp_path / "several", biases, problem_type="multi_label_classification")
    assert scorer(model=several, label="label 0").score(image) == pytest.approx(3 / 4)
    single = with_biases(tmp_path / "single", biases[:1])
    assert scorer(model=single, label="label 0").score(image) == pytest.approx(3 / 4)


def test_a_score_that_is_no_number_is_none(tmp_path: Path) -> None:
    place = with_biases(tmp_path / "model", [float("nan"), 0.0])
    assert scorer(model=place, label="label 1").score(noise_image(16, 16)) is None


def test_the_embedded_classifier_can_be_named() -> None:
    labels = json.loads((Path(tiny_scores.__file__).parents[1] / CLASSIFIER).read_text())["id2label"]
    shares = [scorer(model="picturebook", label=label).score(noise_image(64, 64)) for label in labels.values()]
    assert sum(shares) == pytest.approx(1, abs=1e-5)


CLASSIFIER = "resmaster_stages/picturebook/pack/classifier/config.json"


# -------------------------------------------------------------------------------------------------------------- heads


def embedding(models: Path, image: Image.Image) -> np.ndarray[Any, Any]:
    """A CLIP model's own embedding of an image of the model's size, of unit length, float64."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(models / "clip").eval()
    mean, std = CLIPImageProcessorPil().image_mean, CLIPImageProcessorPil().image_std
    values = (np.asarray(image, np.float32) / 255 - mean) / std
    with torch.inference_mode():
        pixels = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]
        found = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double().numpy()
    return found / np.linalg.norm(found)


SIZE = tiny_scores.CLIP_SIZE


def test_a_head_of_one_layer(models: Path, tmp_path: Path) -> None:
    image, weight = noise_image(16, 16), np.arange(SIZE) - 2.5
    path = tiny_scores.head(tmp_path / "head.safetensors", {"weight": [weight.tolist()], "bias": [6.5]})
    found = scorer("aesthetic", model=str(models / "clip"), head=str(path)).score(image)
    assert found == pytest.approx(float(weight @ embedding(models, image) + 6.5), abs=1e-5)
    constant = tiny_scores.head(tmp_path / "constant.safetensors", {"weight": [[0.0] * SIZE], "bias": [5.25]})
    assert scorer("aesthetic", model=str(models / "clip"), head=str(constant)).score(image) == 5.25


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_layers_follow_each_other_in_the_order_of_their_numbers(models: Path, tmp_path: Path, activation: str) -> None:
    """As LAION's heads are named, whose numbers skip what has no weights; 10 comes after 2."""
    random = np.random.default_rng(5)
    shapes = {"layers.0": (6, SIZE), "layers.2": (4, 6), "layers.10": (1, 4)}
    weights = {name: random.normal(size=shape) for name, shape in shapes.items()}
    biases = {name: random.normal(size=shape[0]) for name, shape in shapes.items() if name != "layers.2"}
    tensors = {f"{name}.weight": value.tolist() for name, value in weights.items()}
    tensors |= {f"{name}.bias": value.tolist() for name, value in biases.items()}
    path = tiny_scores.head(tmp_path / "head.safetensors", dict(sorted(tensors.items())))
    image = noise_image(16, 16)
    x = embedding(models, image)
    for name in shapes:
        x = weights[name] @ x + biases.get(name, 0)
        x = np.maximum(x, 0) if activation == "relu" and name != "layers.10" else x
    model = scorer("aesthetic", model=str(models / "clip"), head=str(path), activation=activation)
    assert model.score(image) == pytest.approx(float(x[0]), abs=1e-5)


def test_images_are_cropped_as_the_models_processor_says(models: Path, tmp_path: Path) -> None:
    """A centre crop does not see the borders of a wide image."""
    path = tiny_scores.head(tmp_path / "head.safetensors", {"weight": [list(map(float, range(SIZE)))]})
    model = scorer("aesthetic", model=str(models / "clip"), head=str(path))
    wide = noise_image(48, 16)
    marked, middle = wide.copy(), wide.copy()
    marked.paste((255, 0, 0), (0, 0, 8, 16))
    middle.paste((255, 0, 0), (20, 0, 28, 16))
    assert model.score(marked) == model.score(wide)
    assert model.score(middle) != model.score(wide)
    assert model.score(wide) == pytest.approx(model.score(wide.crop((16, 0, 32, 16))), abs=1e-5)


# ----------------------------------------------------------------------------------------- what is said before a build


def mistake(**values: Any) -> str:
    """What `plan` says of a score. The rest of the configuration is right."""
    with pytest.raises(ConfigError) as error:
        check(parse_config({"name": "d", "root": values.pop("root"), "quality": {"clip": None, "aesthetic": values}}))
    (line,) = error.value.mistakes
    assert line.startswith("quality.aesthetic: ")
    assert "\n" not in line
    return line


def test_models_that_cannot_be_used_are_one_line(models: Path, tmp_path: Path) -> None:
    classifier, clip = str(models / "classifier"), str(models / "clip")
    head = str(tiny_scores.head(tmp_path / "h.safetensors", {"weight": [[0.0] * SIZE], "bias": [0.0]}))
    root = str(tmp_path)
    assert "has no label 'NSFW'; its labels: normal, nsfw" in mistake(root=root, model=classifier, label="NSFW")
    assert "is 'clip_text_model', no image classifier" in mistake(
        root=root, model=folder_of(tmp_path / "text", "clip_text_model"), label="nsfw"
    )
    assert "is 'vit', no CLIP model" in mistake(root=root, model=classifier, head=head)
    assert "head: gone.safetensors is no file" in mistake(root=root, model=clip, head="gone.safetensors")
    assert "no such folder" in mistake(root=root, model="/no/such/model", label="nsfw")
    assert "has no file model.safetensors" in mistake(
        root=root, model=folder_of(tmp_path / "pickled", "vit", {"0": "nsfw"}), label="nsfw"
    )


def folder_of(folder: Path, kind: str, labels: dict[str, str] | None = None) -> str:
    """A model of which there is but a configuration and pickled weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "id2label": labels or {}}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"classifier.weight": 0}))
    return str(folder)


def test_a_model_that_does_not_say_how_images_are_scaled(tmp_path: Path) -> None:
    place = tiny_scores.classifier(tmp_path / "model")
    check_score(ScoreConfig(model=str(place), label="nsfw"))
    (place / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json, which says how images are scaled"):
        check_score(ScoreConfig(model=str(place), label="nsfw"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": [[0.0] * 5]}, r"weight has the shape \(1, 5\) where 8 numbers come in"),
        ({"weight": [[0.0] * SIZE] * 2}, "its layers end with 2 numbers, not with one"),
        ({"weight": [0.0] * SIZE}, r"weight has the shape \(8,\)"),
        ({"weight": [[0.0] * SIZE], "bias": [0.0, 1.0]}, "weight has the shape"),
        (
            {"0.weight": [[0.0] * SIZE] * 2, "1.weight": [[0.0] * 3]},
            r"1\.weight has the shape \(1, 3\) where 2 numbers",
        ),
        ({"bias": [0.0]}, "weight has the shape"),
        ({"weight": [[0.0] * SIZE], "logit_scale": [1.0]}, "holds logit_scale, which is no weight of a layer"),
        ({"vision_model.conv.weight": [[[[0.0]]]], "weight": [[0.0] * SIZE]}, "weight has the shape"),
        ({}, "its layers end with 8 numbers"),
    ],
    ids=range(9),
)
def test_a_file_that_is_no_head(models: Path, tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    path = tiny_scores.head(tmp_path / "head.safetensors", tensors)
    with pytest.raises(ConfigError, match=said):
        check_score(ScoreConfig(model=str(models / "clip"), head=str(path)))


def test_a_pickled_head_is_not_read(models: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "it-ran",)

    (tmp_path / "head.pth").write_bytes(pickle.dumps(Runs()))
    config = ScoreConfig(model=str(models / "clip"), head=str(tmp_path / "head.pth"))
    with pytest.raises(ConfigError, match=r"head\.pth cannot be read as safetensors"):
        check_score(config)
    with pytest.raises(ConfigError, match=r"head\.pth cannot be read as safetensors"):
        load_score("aesthetic", QualityConfig(clip=None, aesthetic=config))
    assert not (tmp_path / "it-ran").exists()


def test_weights_that_lack_a_layer_are_one_line(tmp_path: Path) -> None:
    """Transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    place = tiny_scores.classifier(tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"quality\.safety: .*lack the weights classifier\.weight") as error:
        scorer(model=str(place), label="nsfw")
    assert "\n" not in str(error.value)


def test_a_model_at_the_hub_is_not_judged_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(NotOnThisMachine):
        check_score(ScoreConfig(model="owner/name", label="nsfw"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids a download"):
        check_score(ScoreConfig(model="owner/name", label="nsfw"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"safety": {"model": "owner/name"}}, "give label"),
        ({"safety": {"model": "owner/name", "label": "x", "head": "y"}}, "and one only"),
        ({"safety": {"model": "owner/name", "label": "x", "activation": "relu"}}, "activation is that of head"),
        ({"safety": {"model": " ", "label": "x"}}, "cannot be empty"),
        ({"min_aesthetic": 5.0}, "min_aesthetic is set, but there is no model in aesthetic"),
        ({"max_unsafe": 0.9}, "max_unsafe is set, but there is no model in safety"),
        ({"safety": {"model": "o/n", "label": "x"}, "max_watermark": 0.9}, "there is no model in watermark"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QualityConfig(**values)


# ----------------------------------------------------------------------------------------------------------- identity


ALWAYS = [
    "clip_score",
    "agreement_psnr",
    "agreement_ssim",
    "detail_energy",
    "seam",
    "seam_worst",
    "lost_worst",
    "added_worst",
    "colour_worst",
    "clipped",
    "luminance_mean",
    "luminance_std",
    "phash",
]
"""The columns that all datasets have. Another list would measure every existing dataset anew."""

HUB = {"model": "owner/name", "label": "nsfw"}


def test_datasets_without_scores_keep_their_identity() -> None:
    from resmaster_stages.dataset.stages import STAGES

    config = parse_config({"name": "d", "model": {"id": "owner/model"}, "quality": {"clip": None}})
    identity = STAGES["quality"].identity(config, Weights("w"))
    assert identity == {
        "quality": {
            "clip": None,
            "clip_revision": None,
            "min_agreement_psnr": 18.0,
            "max_seam": 1.5,
            "max_seam_worst": 6.0,
            "max_lost_worst": 1.2,
            "max_added_worst": 1.5,
            "max_colour_worst": 7.0,
            "max_clipped": 0.25,
        },
        "weights": None,
        "features": None,
        "columns": ALWAYS,
    }


@pytest.mark.parametrize(
    "quality",
    [
        {"safety": HUB},
        {"watermark": HUB},
        {"safety": {**HUB, "label": "normal"}},
        {"safety": {**HUB, "revision": "a" * 40}},
        {"safety": HUB, "max_unsafe": 0.9},
    ],
    ids=range(5),
)
def test_what_is_configured_changes_the_quality_stage_alone(quality: dict[str, Any]) -> None:
    base = {"name": "d", "model": {"id": "owner/model"}}
    plain = parse_config({**base, "quality": {"clip": None}})
    other = parse_config({**base, "quality": {"clip": None, **quality}})
    before, after = stage_hashes(plain), stage_hashes(other)
    assert [stage for stage in after if after[stage] != before[stage]] == ["quality"]
    if quality != {"safety": HUB}:
        assert stage_hashes(parse_config({**base, "quality": {"clip": None, "safety": HUB}})) != after


def test_the_identity_follows_the_weights(models: Path, tmp_path: Path) -> None:
    place = tiny_scores.classifier(tmp_path / "model")
    head = tiny_scores.head(tmp_path / "head.safetensors", {"weight": [[0.0] * SIZE]})
    aesthetic = {"model": str(models / "clip"), "head": str(head)}
    quality = {"clip": None, "safety": {"model": str(place), "label": "nsfw"}, "aesthetic": aesthetic}
    config = parse_config({"name": "d", "quality": quality})
    first = weights_of(config)
    assert [name for name, _ in first.scores] == ["aesthetic", "safety"]
    tiny_scores.head(head, {"weight": [[0.5] * SIZE]})  # of the same size
    second = weights_of(config)
    assert second.scores[0] != first.scores[0]
    assert second.scores[1] == first.scores[1]
    (place / "preprocessor_config.json").write_text("{}")
    third = weights_of(config)
    assert third.scores[1] != second.scores[1]
    hashes = {hashes_of(config, weights)["quality"] for weights in (first, second, third)}
    assert len(hashes) == 3


def test_the_models_of_scores_are_named_with_their_licences() -> None:
    quality = {"safety": {"model": "Falconsai/nsfw_image_detection", "label": "nsfw"}, "watermark": HUB}
    found = {each.part: each for each in licences_of(parse_config({"name": "d", "quality": quality}))}
    assert (found["safety score"].model, found["safety score"].licence.name) == (
        "Falconsai/nsfw_image_detection",
        "apache-2.0",
    )
    assert found["watermark score"].licence.name is None
    assert "aesthetic score" not in found
