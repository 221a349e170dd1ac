"""Finds out how much memory the weights of a base model take on a GPU, from the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.bases import family_of, offload_of
from resmaster_stages.models.bases.base import Offload
from resmaster_stages.models.files import DIFFUSERS, TRANSFORMERS, NotOnThisMachine, folder_with, weight_files
from resmaster_stages.models.places import ModelFiles

TEXT_ENCODER = re.compile(r"text_encoder(_\d)?")
PARTS = re.compile(rf"unet|transformer|vae|image_encoder|{TEXT_ENCODER.pattern}")
"""Parts of a pipeline that have weights and are loaded."""
CONTROL_NET = "controlnet"
"""The part that `model.controlnet` names."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Number formats, as safetensors names them, that are converted to the number format of the configuration."""


@dataclass(frozen=True)
class Memory:
    """The memory that the weights of a base model take on a GPU, in bytes. Views take memory beside."""

    parts: Mapping[str, int]
    """Part -> its weights. An IP-Adapter from elsewhere is not counted."""
    number_format: str
    offload: Offload

    @property
    def texts(self) -> int:
        """The text encoders."""
        return sum(size for part, size in self.parts.items() if TEXT_ENCODER.fullmatch(part))

    @property
    def encoding(self) -> int:
        """While texts are encoded."""
        return self.texts if self.offload == "model" else sum(self.parts.values())

    @property
    def drawing(self) -> int:
        """While images are made."""
        others = {part: size for part, size in self.parts.items() if not TEXT_ENCODER.fullmatch(part)}
        if self.offload == "model":
            beside = others.pop(CONTROL_NET, 0)  # it is there together with the UNet
            return max(size + (beside if part == "unet" else 0) for part, size in others.items())
        return sum(others.values()) + (self.texts if self.offload == "none" else 0)


def memory_of(model: ModelConfig) -> Memory | None:
    """The memory that the weights of a model take. None if the weights are not on this machine."""
    family = family_of(model)
    number_format = family.half if model.dtype == "auto" else model.dtype
    try:
        return Memory(_weights(model, number_format), number_format, offload_of(model))
    except NotOnThisMachine:
        return None


def _weights(model: ModelConfig, number_format: str) -> Mapping[str, int]:
    """Part -> bytes of its weights. Raises ConfigError and NotOnThisMachine."""
    number_bytes = 4 if number_format == "float32" else 2
    folder = folder_with(model.id, "model_index.json", model.revision)
    index = ModelFiles(model.id, model.revision).json("model_index.json")
    places = {
        part: folder / part
        for part, kind in index.items()
        if PARTS.fullmatch(part) and isinstance(kind, list) and None not in kind
    }
    if model.vae is not None:
        places["vae"] = folder_with(model.vae, "config.json")
    variants: dict[str, str | None] = dict.fromkeys(places, model.variant)
    if model.vae is not None:
        variants["vae"] = None
    if (net := model.controlnet) is not None:
        name = (Path(net.folder) / "config.json").as_posix()
        places[CONTROL_NET] = folder_with(net.id, name, net.revision) / net.folder
        variants[CONTROL_NET] = net.variant
    found = {}
    for part, place in places.items():
        variant = variants[part]
        files = weight_files(place, DIFFUSERS, variant) or weight_files(place, TRANSFORMERS, variant)
        if not files:
            raise NotOnThisMachine(model.id)
        wide = part == "vae" and number_format == "bfloat16"  # `models.places.vae_dtype`
        found[part] = sum(_bytes_in(file, 4 if wide else number_bytes) for file in files)
    return found


def _bytes_in(file: Path, number_bytes: int) -> int:
    """Bytes of the tensors of a safetensors file with `number_bytes` per number. Whole numbers hold quantised weights,
    and keep their size. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118 (no dict)
            return sum(prod(each.get_shape()) * (number_bytes if each.get_dtype() in FLOATS else 1) for each in tensors)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors ({first_line(error)}); download it again") from None
