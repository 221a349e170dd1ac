"""Models that give an image a score: image classifiers of Transformers, and heads on CLIP's image embedding.

- With `label`, a model is an image classifier. The score is the probability of the label: by a softmax over all labels,
  or by a sigmoid where the model's `problem_type` says that labels do not exclude each other, or if there is one label.
- With `head`, a model is a CLIP model, and the head a chain of linear layers from its image embedding to one number.
  The embedding is scaled to unit length first, as LAION's aesthetic predictors expect.

Invariants:
- Images are scaled, cropped and normalised as the model's own processor says, by PIL. Many processors crop a square
  from the middle, so borders of wide images do not count.
- Everything is float32, and an image is computed alone, so results do not depend on other images.
- Only safetensors are read, and no code of a model is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from resmaster_stages.config.dataset import QualityConfig, ScoreConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.clip_score import check_clip, load_clip
from resmaster_stages.models.files import (
    TRANSFORMERS,
    folder_with,
    object_in,
    require_weights,
    say_missing,
    tensors_of,
)
from resmaster_stages.models.identity import PICTUREBOOK, head_file
from resmaster_stages.models.places import location, reason_of, resolve_device, whole_weights
from resmaster_stages.models.quiet import quiet

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files of which a model has one. They say how images are scaled."""
SHOWN_LABELS = 20
ADVICE = "set quality.device: cpu"

_TENSOR = re.compile(r"(?:(.*)\.)?(weight|bias)")


class ScoreModel(Protocol):
    """Gives an image a number."""

    def score(self, image: Image.Image) -> float | None:
        """The score of an image of any size. None if it is not finite."""


class LabelModel:
    """An image classifier and one of its labels."""

    def __init__(self, network: Any, processor: Any, label: int) -> None:
        self._network, self._processor, self._label = network, processor, label
        config = network.config
        self._independent = config.problem_type == "multi_label_classification" or config.num_labels == 1

    def score(self, image: Image.Image) -> float | None:
        """The probability of the label, 0 to 1."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        with busy(), torch.inference_mode(), device_faults(ADVICE):
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
            logits = self._network(pixel_values=pixels.to(self._network.device)).logits[0].float().cpu()
            shares = logits.sigmoid() if self._independent else logits.softmax(-1)
            return _finite(shares[self._label])


class HeadModel:
    """A CLIP model, and a head on its image embedding."""

    def __init__(self, clip: Any, processor: Any, head: Any) -> None:
        self._clip, self._processor, self._head = clip, processor, head

    def score(self, image: Image.Image) -> float | None:
        """The head's output, on the scale that the head was trained for."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        with busy(), torch.inference_mode(), device_faults(ADVICE):
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
            seen = self._clip.vision_model(pixel_values=pixels.to(self._clip.device))
            embedding = torch.nn.functional.normalize(self._clip.visual_projection(seen.pooler_output), dim=-1)
            return _finite(self._head(embedding)[0, 0])


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def check_score(config: ScoreConfig) -> None:
    """Raise ConfigError if the model of a score cannot be used, as far as its files say. Loads nothing.

    Raises NotOnThisMachine for a model that is at the hub only.
    """
    if config.head is not None:
        path = head_file(config)
        check_clip(config.model, config.revision)
        folder = folder_with(config.model, "config.json", config.revision, "clip")
        head_layers(path, _embedding_size(folder))
    else:
        folder = folder_with(config.model, "config.json", config.revision, "classifier")
        _check_classifier(config, object_in(folder / "config.json"))
        require_weights(config.model, folder, TRANSFORMERS)
    if not any((folder / name).is_file() for name in PROCESSORS):
        say_missing(config.model, f"{folder} has no {PROCESSORS[0]}, which says how images are scaled")


def _check_classifier(config: ScoreConfig, settings: Mapping[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS

    kind = settings.get("model_type")
    if kind not in KINDS:
        raise ConfigError(
            f"{config.model} is {kind!r}, no image classifier; give an image classifier of Transformers, or head for a "
            "CLIP model"
        )
    found = settings.get("id2label")
    labels = list(found.values()) if isinstance(found, dict) else ["LABEL_0", "LABEL_1"]  # as Transformers has it
    _place_of(config, labels)


def _place_of(config: ScoreConfig, labels: Sequence[Any]) -> int:
    """The number of the label. Raises ConfigError if the model does not have it."""
    if config.label not in labels:
        shown = ", ".join(map(str, labels[:SHOWN_LABELS])) + (", ..." if len(labels) > SHOWN_LABELS else "")
        raise ConfigError(f"{config.model} has no label {config.label!r}; its labels: {shown}")
    return labels.index(config.label)


def _embedding_size(folder: Path) -> int:
    """The length of a CLIP model's image embedding."""
    size = object_in(folder / "config.json").get("projection_dim", 512)  # as Transformers has it
    if not isinstance(size, int):
        raise ConfigError(f"{folder / 'config.json'}: projection_dim is no integer; download the model again")
    return size


def head_layers(path: Path, size: int) -> list[str]:
    """The names of a head's linear layers in order, each with a dot at its end unless it is empty.

    size: the length of the embedding. Raises ConfigError unless the tensors of the file are the weights and biases of
    layers that lead from `size` numbers to one.
    """
    advice = "give linear layers only, each with weight and bias, in the order of their numbers (docs/scores.md)"
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors_of(path).items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise ConfigError(f"{path} holds {name}, which is no weight of a layer; {advice}")
        layers.setdefault(f"{found[1]}." if found[1] else "", {})[found[2]] = shape
    ordered = sorted(layers, key=_numbers_in)
    width = size
    for layer in ordered:
        weight, bias = layers[layer].get("weight", ()), layers[layer].get("bias")
        if len(weight) != 2 or weight[1] != width or bias not in (None, weight[:1]):
            raise ConfigError(f"{path}: {layer}weight has the shape {weight} where {width} numbers come in; {advice}")
        width = weight[0]
    if not ordered or width != 1:
        raise ConfigError(f"{path}: its layers end with {width} numbers, not with one; {advice}")
    return ordered


def _numbers_in(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names by the numbers in them: `layers.2.` before `layers.10.`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def load_score(name: str, quality: QualityConfig) -> ScoreModel:
    """The model that the field `name` of `quality` names. Raises ConfigError, in one line, if it cannot be loaded."""
    config: ScoreConfig = getattr(quality, name)
    return _load_head(name, config, quality.device) if config.head else _load_classifier(name, config, quality.device)


@lru_cache(maxsize=3)
def _load_classifier(name: str, config: ScoreConfig, device: str) -> LabelModel:
    import torch
    from transformers import AutoModelForImageClassification

    resolved, place = resolve_device(device, "quality.device"), location(config.model, "classifier")
    options = _options(config)
    try:
        with quiet(), whole_weights(place):
            network = AutoModelForImageClassification.from_pretrained(
                place, use_safetensors=True, dtype=torch.float32, **options
            )
        processor = _processor(place, options)
        network.to(resolved).eval()
    except Exception as error:  # loaders raise many kinds of errors; the user's remedy is the same
        raise _not_loaded(name, config, error, place) from None
    labels = network.config.id2label
    return LabelModel(network, processor, _place_of(config, [labels[number] for number in range(len(labels))]))


@lru_cache(maxsize=3)
def _load_head(name: str, config: ScoreConfig, device: str) -> HeadModel:
    path, place = head_file(config), location(config.model, "clip")
    clip = load_clip(config.model, config.revision, device).model
    try:
        processor = _processor(place, _options(config))
        head = _head(path, clip.config.projection_dim, config.activation).to(clip.device)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise _not_loaded(name, config, error, place) from None
    return HeadModel(clip, processor, head)


def _head(path: Path, size: int, activation: str) -> Any:
    """The layers in a file, in float32, with the activation between them."""
    import torch
    from safetensors.torch import load_file

    names, tensors = head_layers(path, size), load_file(path)
    modules: list[Any] = []
    for layer in names:
        weight, bias = tensors[f"{layer}weight"].float(), tensors.get(f"{layer}bias")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias.float()})})
        modules += [linear, *([torch.nn.ReLU()] if activation == "relu" and layer != names[-1] else [])]
    return torch.nn.Sequential(*modules).eval()


def _options(config: ScoreConfig) -> dict[str, Any]:
    own = {"revision": config.revision} if config.revision else {}
    return {"trust_remote_code": False, "local_files_only": config.model == PICTUREBOOK, **own}


def _processor(place: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    # by PIL, whether or not torchvision is installed: the two do not give the same pixels
    return AutoImageProcessor.from_pretrained(place, backend="pil", **options)


def _not_loaded(name: str, config: ScoreConfig, error: Exception, place: str) -> ConfigError:
    return ConfigError(
        f"quality.{name}: {config.model!r} cannot be loaded ({reason_of(error, place)}); give a hub id or folder of a "
        "model of Transformers with safetensors weights, or null"
    )
