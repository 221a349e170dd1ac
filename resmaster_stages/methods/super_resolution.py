"""Super-resolution (SDXL + BSRGAN in the papers' tables): one pass of a network that was trained to enlarge pictures.

No diffusion and no prompt: what the low-res picture shows is kept and sharpened, and nothing is added that it does not
show. The sanity baseline of every generative upscaler.

The network has a factor of its own (4, or 2). Larger targets take as many passes as they need, and what comes out larger
than the target is reduced by antialiased bicubic interpolation (the papers do not say how they came to other factors).

Pictures go through in tiles with a halo, so memory depends on the tile alone. Invariant: with a halo as wide as the network
sees, tiles change nothing; the receptive field's rim weighs next to nothing, so a few pixels do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from resmaster_stages.config.methods import SuperResolutionConfig, UpscaleConfig
from resmaster_stages.diffusion.loop import Progress
from resmaster_stages.diffusion.reference import pad_to_multiple, to_image, to_tensor
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import SampleError
from resmaster_stages.models.busy import busy
from resmaster_stages.models.enlarger import Enlarger, load_enlarger
from resmaster_stages.models.faults import device_faults


def tile_grid(height: int, width: int, settings: SuperResolutionConfig) -> Grid:
    """Tiles of a picture, halo included: neighbours share two halos."""
    return Grid(height, width, settings.tile, settings.tile - 2 * settings.halo)


def cores(origins: tuple[int, ...], window: int, halo: int) -> list[tuple[int, int]]:
    """The part [start, end) of an axis that each tile contributes: it reaches up to a halo from the tile's inner borders."""
    starts: list[int] = []
    ends: list[int] = []
    for number, origin in enumerate(origins):
        last = number == len(origins) - 1
        starts.append(ends[-1] if ends else 0)
        ends.append(origin + window - (0 if last else halo))
    return list(zip(starts, ends))


def tiled(
    enlarge: Callable[[Tensor], Tensor],
    scale: int,
    pixels: Tensor,
    settings: SuperResolutionConfig,
    tick: Callable[[], None],
) -> Tensor:
    """`pixels` [1, 3, h, w] through `enlarge`, tile by tile: [1, 3, scale h, scale w]."""
    grid = tile_grid(pixels.shape[-2], pixels.shape[-1], settings)
    large = pixels.new_empty(1, 3, grid.height * scale, grid.width * scale)
    columns = list(zip(grid.cols, cores(grid.cols, grid.window_width, settings.halo)))
    for y, (top, bottom) in zip(grid.rows, cores(grid.rows, grid.window_height, settings.halo)):
        for x, (left, right) in columns:
            made = enlarge(pixels[..., y : y + grid.window_height, x : x + grid.window_width])
            inside = made[..., (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
            large[..., top * scale : bottom * scale, left * scale : right * scale] = inside
            tick()
    return large


def sizes(height: int, width: int, scale: float, factor: int) -> list[tuple[int, int]]:
    """(height, width) of the input of each pass on the way to `scale` times the size, at least one."""
    passes = [(height, width)]
    while factor ** len(passes) < scale * (1 - 1e-9):
        passes.append((passes[-1][0] * factor, passes[-1][1] * factor))
    return passes


def enlarged(
    enlarger: Enlarger,
    image: Image.Image,
    height: int,
    width: int,
    config: UpscaleConfig,
    progress: Progress | None = None,
) -> Tensor:
    """`image` at `height` x `width` px: [3, height, width], about 0 to 1. `progress` hears (tiles done, tiles in all)."""
    settings, multiple = config.super_resolution, enlarger.multiple
    pixels = to_tensor(image) / 2 + 0.5
    passes = sizes(image.height, image.width, config.scale, enlarger.scale)
    padded_sizes = ((-(-rows // multiple) * multiple, -(-cols // multiple) * multiple) for rows, cols in passes)
    total = sum(len(tile_grid(rows, cols, settings)) for rows, cols in padded_sizes)
    done = count(1)

    def tick() -> None:
        if progress:
            progress(next(done), total)

    for rows, cols in passes:
        padded = pad_to_multiple(pixels, multiple)
        large = tiled(enlarger, enlarger.scale, padded, settings, tick)
        pixels = large[..., : rows * enlarger.scale, : cols * enlarger.scale].clamp(0, 1)
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return pixels[0]


def super_resolve(
    image: Image.Image,
    height: int,
    width: int,
    config: UpscaleConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Image.Image:
    """`image` at `height` x `width` px by the network that `config.super_resolution` names.

    Raises ConfigError (weights that cannot be read, too little memory), SampleError (a result that is not finite) and GpuLost.
    """
    enlarger = load_enlarger(config.super_resolution, device, dtype)
    with busy(), device_faults("lower upscale.super_resolution.tile"):
        pixels = enlarged(enlarger, image, height, width, config, progress)
    if not torch.isfinite(pixels).all():
        raise SampleError("the network produced NaN or infinite values; try model.dtype: float32 or bfloat16")
    return to_image(pixels * 2 - 1)
