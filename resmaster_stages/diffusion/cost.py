"""What a method costs in UNet evaluations, from the grid and the settings. Loads no model and no torch.

Invariant: the counts are those of `diffusion.loop.denoise`, which a test counts on a real UNet.
"""

from __future__ import annotations

from dataclasses import dataclass

from resmaster_stages.config import UpscaleConfig
from resmaster_stages.diffusion.views import view_grid, whole_canvas


@dataclass(frozen=True)
class UnetCost:
    """Of one picture."""

    calls: int
    """Forward passes; depends on `view_batch`."""
    rows: int
    """Views through the UNet in all passes, guidance branches and repeats of short batches counted."""
    native_rows: float
    """`rows` times a view's area over the native area: what to compare methods of different views by."""


def unet_cost(config: UpscaleConfig, height: int, width: int, native_px: int, latent_factor: int) -> UnetCost:
    """The cost of one picture of `height` x `width` px by `config.method`."""
    if config.method == "direct":
        grid = whole_canvas(height, width, latent_factor)
    else:
        grid = view_grid(height, width, native_px, config.stride, latent_factor)
    batches = -(-len(grid) // config.view_batch)
    size = -(-len(grid) // batches)
    rows = config.steps * batches * size * (2 if config.guidance_scale != 1 else 1)
    area = grid.window_height * grid.window_width / (native_px // latent_factor) ** 2
    return UnetCost(config.steps * batches, rows, rows * area)
