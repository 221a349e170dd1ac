"""Renders the images of a request: draws the noise, denoises pass by pass, decodes and checks.

Invariants:
- A sample whose latents or pixels are not finite, or whose image is all black, gives a SampleError in its own place.
  The other samples of the batch are not affected.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from PIL import Image

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.loop import CanvasNoise, Progress, batch_size, denoise
from resmaster_stages.diffusion.reference import to_image
from resmaster_stages.errors import SampleError
from resmaster_stages.methods.request import Request
from resmaster_stages.models.bases import require
from resmaster_stages.models.busy import busy
from resmaster_stages.models.faults import device_faults


def render(request: Request, seeds: Sequence[int], progress: Progress | None = None) -> list[Image.Image | SampleError]:
    """One image of the requested size per seed and prompt, or a SampleError in its place.

    Raises ConfigError (a setting that the model cannot serve, or too little memory) and GpuLost.
    """
    models, config = request.models, request.config
    require(models.base.family, models.identity, config.needs())
    advice = "lower upscale.view_batch or low_res.batch_size, or set model.offload: model"
    with busy(), device_faults(advice, batch_size(len(request.prompts) * len(request.views()), request.view_limit)):
        passes = config.passes(request)
        paths = [(request.path if each.path is None else each.path)[each.first :] for each in passes]
        noise = CanvasNoise(seeds, models.base.latent_channels, *request.canvas_size, models.device)
        done, total = count(1), sum(map(len, paths))

        def tick() -> None:
            if progress:
                progress(next(done), total)

        z = None
        for each, path in zip(passes, paths):
            draw = noise.resized(each.height, each.width)
            z, composition = each.begin(z, draw, path[0])  # [B, C, h, w]
            composition = config.controlled(request, composition, each.height, each.width)
            z = denoise(models, composition, path, z, draw, view_batch=request.view_limit, progress=tick)
            z = each.finish(z)
        assert z is not None
        pixels = autoencoder.decode(models, z, config.wraps)[..., : request.height, : request.width]
        finite = torch.isfinite(pixels).flatten(1).all(dim=1).tolist()
    return [_checked(image) if ok else _not_finite(config.steps) for image, ok in zip(pixels, finite)]


def _not_finite(steps: int) -> SampleError:
    return SampleError(
        f"the model produced NaN or infinite values in {steps} steps; try model.dtype: float32 or bfloat16, "
        "or model.vae: a VAE that is safe in float16"
    )


def _checked(pixels: torch.Tensor) -> Image.Image | SampleError:
    image = to_image(pixels)
    if image.getextrema() == ((0, 0), (0, 0), (0, 0)):
        return SampleError("the image is all black; try another prompt, or model.dtype: float32")
    return image
