"""Families of base models. Each family has a file here and a line in `FAMILIES`. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import as_flow, chroma, flux, flux2, pixart, qwen_image, sd3, unet, z_image
from resmaster_stages.models.bases.base import Ability, Family, Offload
from resmaster_stages.models.identity import PICTUREBOOK_AS_FLOW
from resmaster_stages.models.places import ModelFiles

FAMILIES: list[Family] = [
    unet.SDXL,
    unet.STABLE_DIFFUSION,
    flux.FLUX,
    chroma.CHROMA,
    sd3.SD3,
    pixart.PIXART_SIGMA,
    pixart.PIXART_ALPHA,
    z_image.Z_IMAGE,
    qwen_image.QWEN_IMAGE,
    flux2.FLUX_2,
    flux2.FLUX_2_KLEIN,
]


_WAYS_OUT = {
    "upscale.image_prompt.enabled": "set it to false, which leaves structural guidance and captions (upscale.init: "
    "noised_lr with a higher start then holds the image closer)",
    "model.ip_adapter": "set it to null",
    "captions.source: attention": "set it to model, server or prompt",
    "low_res.wrap": "set it to none (images: FOLDER takes images of your own, which may wrap)",
    "upscale.wrap": "set upscale.method to resmaster or multidiffusion, whose views wrap",
    "model.few_step": "leave it out",
    "upscale.control.enabled": "set it to false",
    "model.controlnet": "set it to null",
}
"""What to do about a setting that needs an ability, where there is more to say than to choose another."""


def family_of(config: ModelConfig) -> Family:
    """The family of the model that `config` names, found by its `model_index.json`. Raises ConfigError."""
    if config.id == PICTUREBOOK_AS_FLOW:
        return as_flow.AS_FLOW
    name = ModelFiles(config.id, config.revision).json("model_index.json").get("_class_name")
    if not isinstance(name, str):
        raise ConfigError(f"model {config.id!r}: model_index.json names no pipeline class; download the model again")
    return _family((name,), config.id)


def offload_of(config: ModelConfig) -> Offload:
    """The modules of the model that `config` names that are on a GPU only while they work. Raises ConfigError."""
    if config.offload == "auto":
        return "text" if family_of(config).large_text else "none"
    return config.offload


def family_of_pipeline(pipe: object, model: str) -> Family:
    """The family of a loaded pipeline, found by its class or a base class. Raises ConfigError."""
    return _family(tuple(kind.__name__ for kind in type(pipe).__mro__), model)


def require(family: Family, model: str, needs: Mapping[Ability, str]) -> None:
    """Raises ConfigError unless `family`, to which `model` belongs, has all abilities of `needs`.

    needs: ability -> the method or setting that needs it.
    """
    for ability, whose in needs.items():
        if ability not in family.abilities:
            known = ", ".join(each.name for each in FAMILIES if ability in each.abilities)
            raise ConfigError(
                f"{whose}: needs {ability.replace('_', ' ')}, which model {model} ({family.name}) has not; "
                f"{_WAYS_OUT.get(whose, 'choose another setting')}, or a base model of: {known}"
            )


def _family(classes: tuple[str, ...], model: str) -> Family:
    """The family for the first name in `classes` that belongs to a known family. Raises ConfigError."""
    for name in classes:
        for family in (*FAMILIES, as_flow.AS_FLOW):  # which no model's files name
            if re.fullmatch(family.pipelines, name):
                return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ConfigError(
        f"model {model}: is a {classes[0]}, and the known families of base models are {known}; "
        "give a base model of one of them"
    )
