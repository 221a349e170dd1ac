"""What the tests of all families of transformers share: one view through the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.methods.direct import Direct
from resmaster_stages.methods.request import Request
from resmaster_stages.models.parts import Models


def start(models: Models, height: int, width: int, seed: int = 5, batch: int = 1) -> Tensor:
    """Noise for canvases of `height` x `width` px: [B, C, h, w]."""
    factor = models.geometry.latent_factor
    shape = (batch, models.base.latent_channels, height // factor, width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def engine(
    models: Models,
    noise: Tensor,
    prompts: tuple[str, ...],
    negative_prompts: tuple[str, ...] | None = None,
    **values: Any,
) -> Tensor:
    """The latents [B, C, h, w] that the engine draws from `noise` on one view, the whole canvas."""
    factor = models.geometry.latent_factor
    config = Direct(**{"stepper": "ddim_keep", **values})
    height, width = noise.shape[-2] * factor, noise.shape[-1] * factor
    request = Request(models, config, height, width, prompts, negative_prompts or ("",) * len(prompts))
    (stage,) = config.passes(request)
    drawn = CanvasNoise([0], noise.shape[1], *noise.shape[-2:], models.device)
    _, composition = stage.begin(None, drawn, request.path[0])
    return denoise(models, composition, request.path, noise, drawn, view_batch=16)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference, as a share of the greatest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
