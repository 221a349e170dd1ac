"""What a method is asked for: a canvas of some size, with prompts, and mostly a reference to follow.

Invariants:
- A batch has one prompt, one negative prompt and one seed per sample, and one size for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from resmaster_stages.config import UpscaleConfig
from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.views import Grid, view_grid, whole_canvas
from resmaster_stages.models.loading import Models


@dataclass(frozen=True, eq=False)
class Reference:
    """The enlarged low-res pictures B^L, and what is derived from them once."""

    models: Models
    pixels: Tensor  # [B, 3, H, W] in [-1, 1], sides padded to multiples of the latent factor
    scale: float

    @cached_property
    def latents(self) -> Tensor:
        """[B, C, H/f, W/f], float32."""
        return autoencoder.encode(self.models, self.pixels)


@dataclass(frozen=True, eq=False)
class Request:
    """One batch of canvases to be made by one method."""

    models: Models
    config: UpscaleConfig
    height: int
    """Of the pictures, in px."""
    width: int
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...] | None = None
    """Per sample and view, row-major; None: the sample's prompt for every view."""
    reference: Reference | None = None
    """None where there is nothing to follow: generation of the low-res pictures themselves."""

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.config.guidance_scale != 1

    def views(self) -> Grid:
        """The grid of native-size views."""
        models = self.models
        return view_grid(self.height, self.width, models.native_px, self.config.stride, models.latent_factor)

    def canvas(self) -> Grid:
        """The grid whose one view is the whole canvas."""
        return whole_canvas(self.height, self.width, self.models.latent_factor)

    def per_view(self, texts: tuple[str, ...], grid: Grid) -> list[str]:
        """Each sample's text for each of its views."""
        return [text for text in texts for _ in range(len(grid))]
