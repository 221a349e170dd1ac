"""The canvas as a caller sees it after each step: how far it is, previews, and a way to stop.

Invariant: nothing here computes or waits for the device until a caller asks for a preview or an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.reference import resized, to_image
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Step

CHART = 16
"""Patches along each side of the colour chart that `colours` is fitted to."""


class Interrupted(Exception):
    """Raised within the loop when a caller has stopped it."""


@dataclass(eq=False)
class Canvas:
    """One batch of images that is being drawn. The same object is given after every step."""

    models: Models
    steps: int
    """Steps in all, those of all passes."""
    wraps: Axes = (False, False)
    step: int = -1
    """Number of the last step, from 0."""
    timestep: float = 0.0
    """The model's timestep at that step."""
    latents: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, C, H, W]
    """The noisy latents that the next step starts from. Set them to go on from others of the same shape."""
    x0: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, C, H, W]
    """The clean latents that the last step predicted."""
    number: int = 0
    """Number of the first image of the batch, from 0, where a call makes several images."""
    interrupt: bool = False
    """Set to True to stop: no further step is computed, and the images are those of `x0`."""

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:  # the name that callbacks written for diffusers set
        self.interrupt = value

    @property
    def num_timesteps(self) -> int:
        """`steps`, under diffusers' name."""
        return self.steps

    def advance(self, step: Step, z: Tensor, x0: Tensor, seen: OnStep) -> Tensor:
        """Show `seen` the canvas after `step`. Returns the latents to go on from. Raises Interrupted, and ConfigError
        if the latents were replaced by others that do not fit."""
        self.step, self.timestep, self.latents, self.x0 = self.step + 1, step.t, z, x0
        seen(self)
        if self.interrupt:
            raise Interrupted
        if self.latents is z:
            return z
        if self.latents.shape != z.shape:
            raise ConfigError(
                f"callback_on_step_end: gave latents of {[*self.latents.shape]} for {[*z.shape]}; keep their shape"
            )
        return self.latents.to(z)

    def preview(self, index: int = 0) -> Image.Image:
        """What `x0` shows, at one px per latent, by a linear map of channels to colours: cheap at every step."""
        with torch.inference_mode():
            weights = colours(self.models).to(self.x0)  # [C + 1, 3]
            pixels = torch.einsum("chw,cd->dhw", self.x0[index], weights[:-1]) + weights[-1][:, None, None]
        return to_image(pixels)

    def image(self, index: int = 0) -> Image.Image:
        """What `x0` shows, decoded by the VAE. This takes as long as decoding the finished image."""
        return to_image(autoencoder.decode(self.models, self.x0[index : index + 1], self.wraps)[0])


OnStep = Callable[[Canvas], object]
"""Called with the canvas after each step."""

_colours: WeakKeyDictionary[Models, Tensor] = WeakKeyDictionary()


def colours(models: Models) -> Tensor:
    """The linear map from latents to colours that fits a model's VAE best: [C + 1, 3], the last row for a constant.

    It is fitted once per loaded model, by least squares, to a chart of smooth random colours and the chart's latents.
    """
    if models not in _colours:
        side, factor = models.geometry.native_px, models.geometry.latent_factor
        draw = torch.rand(1, 3, CHART, CHART, generator=torch.Generator().manual_seed(0))
        chart = resized(draw * 2 - 1, side, side, "bilinear")
        latents = autoencoder.encode(models, chart)[0].flatten(1).T.cpu()  # [n, C]
        wanted = F.avg_pool2d(chart, factor)[0].flatten(1).T  # [n, 3]
        known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
        _colours[models] = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
    return _colours[models]
