"""Encodes pixels to latents and decodes latents to pixels, on canvases of any size.

A canvas is cut into tiles of the native size. Neighbouring tiles overlap by a quarter and are blended linearly. Along
an axis that wraps, tiles cross the border too. This module does not deal with prompts or denoising steps.

Invariants:
- A canvas whose area is at most that of a native image is one tile, and is computed as diffusers computes it. If an
  axis of it wraps, it is computed twice, begun at its border and in its middle, and blended so that no border shows.
- A VAE in float16 that overflows there (`force_upcast`) is converted to float32 for the call and converted back
  afterwards, also after an exception. (A VAE beside a UNet in bfloat16 is loaded in float32:
  `models.places.vae_dtype`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resmaster_stages.config.wrap import Axes
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.models.parts import Models

_NATIVE_PX = 1024 * 1024
"""Pixels of one native tile of SDXL. For a small model these are many tiles."""
_MOST_AT_ONCE = 4
"""The most native tiles of SDXL that one call of the VAE gets."""
_BYTES_PER_NATIVE = 16 * 2**30
"""GPU memory that one native tile in a call needs. SDXL's decoder holds up to four feature maps of 256 channels and a
native tile's size, 1 GiB each in float32. cuDNN's workspace and the rest of the model need memory as well."""


def px_at_once(device: torch.device) -> int:
    """Pixels that go through the VAE in one call: `_NATIVE_PX`, and up to four times as many on a GPU with much memory.

    The number depends on the device's total memory, not on the free memory, so that the same device makes the same
    calls every time. How much several tiles per call gain has not been measured.
    """
    if device.type != "cuda":
        return _NATIVE_PX
    tiles = torch.cuda.get_device_properties(device).total_memory // _BYTES_PER_NATIVE
    return _NATIVE_PX * min(_MOST_AT_ONCE, max(1, tiles))


def tile_grid(height: int, width: int, native: int, wraps: Axes = (False, False)) -> Grid:
    """The tiles of a canvas of `height` x `width` latents: the whole canvas, or `native`-size tiles that overlap by a
    quarter. Tiles of the whole length of an axis that wraps overlap by a half."""
    if height * width <= native**2:
        size = max(height, width)
        return Grid(height, width, size, -(-size // 2) if any(wraps) else size, wraps=wraps)
    return Grid(height, width, native, max(1, native - native // 4), wraps=wraps)


@contextmanager
def _safe_precision(vae: Any) -> Iterator[None]:
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def _by_tiles(
    canvas: Tensor, cut: Fuser, blend: Fuser, compute: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """Apply `compute` to every tile of `canvas` [B, C, H, W] and blend the results.

    Tiles are computed row by row, so that memory holds one row of tiles. The tiles of a row are spread evenly over its
    calls: 5 tiles with at most 4 per call are calls of 3 and 2.
    """
    tile_px = max(cut.window_height * cut.window_width, blend.window_height * blend.window_width)
    at_once = max(1, px_at_once(canvas.device) // tile_px)
    result: Tensor | None = None
    for row in range(len(cut.rows)):
        tiles = cut.cut_row(canvas, row)
        calls = -(-len(tiles) // at_once)
        computed = torch.cat([compute(batch.to(dtype)).float() for batch in tiles.tensor_split(calls)])
        if result is None:
            result = computed.new_zeros(len(canvas), computed.shape[1], blend.height, blend.width)
        blend.add_row(result, computed, row)
    assert result is not None
    return result


def encode(models: Models, pixels: Tensor, wraps: Axes = (False, False)) -> Tensor:
    """Encode `pixels` [B, 3, H, W] in [-1, 1] as latents [B, C, H/f, W/f] in float32. Sides are multiples of f.

    wraps: whether the image continues at the opposite border, along its height and along its width.
    The result is the mode of the VAE's distribution, not a sample: noise in a sampled reference would be swapped into
    every step.
    """
    vae, factor = models.base.vae, models.geometry.latent_factor
    grid = tile_grid(pixels.shape[-2] // factor, pixels.shape[-1] // factor, models.geometry.native, wraps)
    cut = Fuser(grid, "linear", models.device, scale=factor)
    blend = Fuser(grid, "linear", models.device)
    with torch.inference_mode(), models.using(vae), _safe_precision(vae):
        latents = _by_tiles(pixels.to(models.device), cut, blend, lambda x: vae.encode(x).latent_dist.mode(), vae.dtype)
    return models.base.to_canvas(latents)


def decode(models: Models, latents: Tensor, wraps: Axes = (False, False)) -> Tensor:
    """Decode `latents` [B, C, h, w] to pixels [B, 3, h*f, w*f] in about [-1, 1] (not clamped), float32. wraps: as for
    `encode`."""
    vae, factor = models.base.vae, models.geometry.latent_factor
    grid = tile_grid(latents.shape[-2], latents.shape[-1], models.geometry.native, wraps)
    cut = Fuser(grid, "linear", models.device)
    blend = Fuser(grid, "linear", models.device, scale=factor)
    z = models.base.from_canvas(latents)
    with torch.inference_mode(), models.using(vae), _safe_precision(vae):
        return _by_tiles(z, cut, blend, lambda tile: vae.decode(tile, return_dict=False)[0], vae.dtype)
