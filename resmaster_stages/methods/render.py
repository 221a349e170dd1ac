"""Draws the images of a request: draws the noise, denoises pass by pass, decodes and checks.

Invariants:
- A sample whose latents or pixels are not finite, or whose image is all black, gives a SampleError in its own place.
  The other samples of the batch are not affected.
- Latents are decoded only where pixels are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.canvas import Canvas, Interrupted, OnStep
from resmaster_stages.diffusion.loop import CanvasNoise, Seed, batch_size, denoise
from resmaster_stages.diffusion.reference import enlarged, to_image
from resmaster_stages.errors import SampleError
from resmaster_stages.methods.request import Request
from resmaster_stages.models.bases import require
from resmaster_stages.models.busy import busy
from resmaster_stages.models.faults import device_faults

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Drawn:
    """The images of a request as latents. They are decoded when pixels are asked for."""

    request: Request
    z: Tensor  # [B, C, h, w]; a smaller canvas if the drawing was interrupted in an early pass
    size: tuple[int, int]
    """(height, width) of the images, in px. They are enlarged to it if they were drawn smaller."""
    interrupted: bool = False
    """Whether the drawing ended early: the images are then what the last step predicted."""

    def latents(self) -> list[Tensor | SampleError]:
        """The clean latents of each image, [C, h, w] as the denoiser has them, float32, or a SampleError."""
        return self._finite(self.z)

    def pixels(self) -> list[Tensor | SampleError]:
        """Each image, [3, H, W] in about [-1, 1] (not clamped), float32, or a SampleError in its place."""
        models, wraps = self.request.models, self.request.config.wraps
        with _on_device(self.request):
            pixels, factor = autoencoder.decode(models, self.z, wraps), models.geometry.latent_factor
            if self.z.shape[-2:] != self.request.canvas_size:
                rows, cols = self.request.canvas_size
                pixels = enlarged(pixels, rows * factor, cols * factor)
            pixels = pixels[..., : self.request.height, : self.request.width]
            if pixels.shape[-2:] != self.size:
                pixels = enlarged(pixels, *self.size)
            return self._finite(pixels)

    def images(self) -> list[Image.Image | SampleError]:
        """Each image as 8-bit RGB, or a SampleError in its place."""
        return [tried(visible, each) for each in self.pixels()]

    def _finite(self, values: Tensor) -> list[Tensor | SampleError]:
        finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
        return [each if ok else _not_finite(self.request.config.steps) for each, ok in zip(values, finite)]


def render(request: Request, seeds: Sequence[Seed], on_step: OnStep | None = None) -> list[Image.Image | SampleError]:
    """One image of the requested size per seed and prompt, or a SampleError in its place.

    Raises ConfigError (a setting that the model cannot serve, or too little memory) and GpuLost.
    """
    return draw(request, seeds, on_step).images()


def draw(request: Request, seeds: Sequence[Seed], on_step: OnStep | None = None) -> Drawn:
    """What `render` decodes. Raises the same errors."""
    models, config = request.models, request.config
    require(models.base.family, models.identity, config.needs())
    with _on_device(request):
        passes = config.passes(request)
        paths = [(request.path if each.path is None else each.path)[each.first :] for each in passes]
        noise = CanvasNoise(seeds, models.base.latent_channels, *request.canvas_size, models.device)
        canvas = Canvas(models, sum(map(len, paths)), config.wraps)
        after = None if on_step is None else lambda step, z, x0: canvas.advance(step, z, x0, on_step)
        z = None
        try:
            for each, path in zip(passes, paths):
                draw = noise.resized(each.height, each.width)
                z, composition = each.begin(z, draw, path[0])  # [B, C, h, w]
                composition = config.controlled(request, composition, each.height, each.width)
                z = denoise(models, composition, path, z, draw, view_batch=request.view_limit, after=after)
                z = each.finish(z)
        except Interrupted:
            z = canvas.x0
        assert z is not None
    return Drawn(request, z, (request.height, request.width), canvas.interrupt)


@contextmanager
def _on_device(request: Request) -> Iterator[None]:
    """Counts the block as the device's work, and says of its errors what to do."""
    advice = "lower upscale.view_batch or low_res.batch_size, or set model.offload: model"
    with busy(), device_faults(advice, batch_size(len(request.prompts) * len(request.views()), request.view_limit)):
        yield


def _not_finite(steps: int) -> SampleError:
    return SampleError(
        f"the model produced NaN or infinite values in {steps} steps; try model.dtype: float32 or bfloat16, "
        "or model.vae: a VAE that is safe in float16"
    )


def visible(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as an 8-bit RGB image. Raises SampleError if nothing can be seen on it."""
    image = to_image(pixels)
    if image.getextrema() == ((0, 0), (0, 0), (0, 0)):
        raise SampleError("the image is all black; try another prompt, or model.dtype: float32")
    return image


def good(made: T | SampleError) -> T:
    """What was made. Raises the error that stands in its place."""
    if isinstance(made, SampleError):
        raise made
    return made


def tried(work: Callable[[Tensor], T], made: Tensor | SampleError) -> T | SampleError:
    """`work` of what was made, or the error that stands in its place or that `work` raises."""
    try:
        return work(good(made))
    except SampleError as error:
        return error
