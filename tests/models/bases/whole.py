"""What every family of transformers must do beyond its parity: independent rows, methods, and refusals in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, DenoiserCall
from resmaster_stages.diffusion.loop import predict, static_batches
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError, SampleError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.load import load_models
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.checks import check
from resmaster_stages.planning.workload import denoising_of, high_res_work
from tests.methods.common import settings, some_image

METHODS: dict[str, dict[str, Any]] = {
    "direct": {},
    "multidiffusion": {},
    "resmaster": {"image_prompt": {"enabled": False}},
    "demofusion": {},
    "c_upscale": {"share": 0},
}
"""The methods that need neither convolutions nor attentions of UNets, and their settings."""

CONVOLUTIONS = ("scalecrafter", "fouriscale", "hidiffusion", "freescale")


# ---------------------------------------------------------------------------------------------------------- rows


def rows_of(models: Models, views: Tensor, prompts: Sequence[str], level: float = 700.0, at_once: int = 16) -> Tensor:
    """The unconditional and conditional predictions of `views` [N, C, h, w]: [2, N, C, h, w]."""
    factor = models.geometry.latent_factor
    grid = view_grid(models.geometry, views.shape[-2] * factor, views.shape[-1] * factor, 0.5)
    assert len(grid) == 1
    with torch.inference_mode():
        conditions = make_conditions(models, grid, prompts, [""] * len(prompts), guidance_scale=4.0)
        branches = (NEGATIVE, TEXT) if models.guided(4.0) else (TEXT,)
        call = DenoiserCall(branches=branches)
        batches = static_batches(len(views), at_once)
        return torch.stack(predict(models.base, views, torch.tensor(level), conditions, call, batches))


def some_views(models: Models, count: int, height: int = 16, width: int = 16) -> Tensor:
    """Noise: [count, C, height, width]."""
    shape = (count, models.base.latent_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------------- methods


def drawn(models: Models, method: str, prompt: str = "a cat", **values: Any) -> Image.Image:
    """An image of 40 x 56 px, whose canvas must be padded, enlarged to 80 x 112 px."""
    config = settings(method, **METHODS[method], view_batch=1, **values)
    return upscale_image(models, some_image(56, 40), prompt, config=config, seed=2)


def counted_and_forecast(model: ModelConfig, method: str, **values: Any) -> tuple[int, int]:
    """Rows that a method computes with the model in a folder, and the rows that are forecast from the folder."""
    config = settings(method, **METHODS[method], view_batch=1, **values)
    with counting() as counted:
        upscale_image(load_models(model), some_image(56, 40), "a cat", config=config)
    work = high_res_work(config, denoising_of(model), 40, 56)
    return counted.rows, sum(each.rows for each in work)


def is_visible(image: Image.Image) -> bool:
    """Whether an image has contents: finite, and not of one colour."""
    return float(np.asarray(image).std()) > 1


def refusals(config: DatasetConfig) -> tuple[str, ...]:
    """What planning, loading or drawing says against a dataset's model; nothing if it draws. Other errors are
    raised."""
    try:
        check(config)
    except ConfigError as error:
        return error.mistakes
    try:
        models, asked = load_models(config.model), config.low_res
        scale = asked.guidance_scale
        (image,) = generate(models, ["a cat"], [""], [0], 32, 32, asked.steps, scale, 1)
    except ConfigError as error:
        return error.mistakes
    assert isinstance(image, Image.Image | SampleError)
    return ()
