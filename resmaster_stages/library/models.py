"""Models as callers name them, and the settings that fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import SDXL, ModelConfig
from resmaster_stages.models.bases.base import Sampling
from resmaster_stages.models.identity import PACK_MODELS, PICTUREBOOK

if TYPE_CHECKING:
    from resmaster_stages.models.parts import Models

PICTUREBOOK_UPSCALE: Mapping[str, Any] = {
    "steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "micro_conditioning": "native",
}
"""Settings for the embedded model, as in deployments/datasets/picturebook.yaml."""

NO_CAPTIONER = ("attention", "prompt")
"""Sources of captions without a captioner that may stand in place of its name."""


def load(model: Any = PICTUREBOOK) -> Models:
    """Load a model once, for many calls of `upscale` and `generate`. The last one stays loaded.

    model: `picturebook`, a hub id, a folder, a whole configuration or its part `model` (docs/configuration.md), a
    diffusers pipeline that you have loaded, which is used as it is, or a model that is loaded already.

    Raises ConfigError with one line that says what to do.
    """
    from resmaster_stages.models.load import load_models
    from resmaster_stages.models.parts import Models

    if isinstance(model, str | Path):
        model = parse_config(single(str(model)), "model")
    elif isinstance(model, Mapping):
        model = parse_config({"name": "single", "model": dict(model)}, "model")
    if isinstance(model, DatasetConfig):
        model = model.model
    if isinstance(model, ModelConfig):
        return load_models(model)
    return model if isinstance(model, Models) else Models.from_pipeline(model)


def single(model: str, captioner: str = "auto", models: Models | None = None) -> dict[str, Any]:
    """The configuration to upscale one image with `model`, as a user would write it: settings for model and captioner.

    captioner: as `captions` in `upscale`. models: the model, if it is already loaded. Raises ConfigError.
    """
    picturebook, sdxl = model in PACK_MODELS, model == SDXL["id"]
    if captioner == "auto":
        captioner = PICTUREBOOK if picturebook else "prompt"
    upscale = dict(PICTUREBOOK_UPSCALE) if picturebook else {}
    adapter = models is not None and models.base.image_adapter() is not None
    few_step = models is not None and models.base.sampling.steppers
    if not (picturebook or sdxl or adapter):
        upscale["image_prompt"] = {"enabled": False}  # a bare checkpoint has no adapter
        upscale |= recommended(models.base.sampling if models else sampling_of(model))
    if models and few_step:
        upscale |= {**recommended(models.base.sampling), "stepper": few_step[0]}
    return {
        "name": "single",
        "model": SDXL if sdxl else {"id": model},
        "captions": {"source": captioner} if captioner in NO_CAPTIONER else {"source": "model", "model": captioner},
        "upscale": upscale,
    }


def sampling_of(model: str) -> Sampling:
    """What can be asked of the sampling of the model with this name. Raises ConfigError."""
    from resmaster_stages.models.bases import family_of

    config = parse_config({"name": "single", "model": {"id": model}}).model
    return family_of(config).sampling(config)


def recommended(sampling: Sampling, steps: bool = False) -> dict[str, Any]:
    """The recommended settings, where this project's defaults do not fit. `steps`: with their number also where the
    default number is fit."""
    if sampling == Sampling():
        return {}
    values: dict[str, Any] = {"guidance_scale": sampling.guidance_scale}
    if steps or sampling.most_steps < Sampling().steps:
        values["steps"] = sampling.steps
    return values
