"""Scale fusion (FreeScale): self-attention takes fine detail from the whole canvas and coarse detail from windows.

    out = global + blur(local - global)

global: attention over the whole canvas or, in the fast form, among every n-th token of the canvas. local: attention
inside overlapping windows of the native size, averaged. Both use the same projections, which are computed once on the
canvas. All windows run as one batch. This module does not depend on a method.

Invariants:
- A layer whose canvas fits into one window stays plain. All layers are restored at the end of the block.
- The places of the windows are drawn once per step and level, from each sample's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.diffusion.frequency import gaussian_blur
from resmaster_stages.diffusion.guidance import DenoiserCall
from resmaster_stages.diffusion.irregular_views import Origins, ScatteredViews, clamped, jittered
from resmaster_stages.diffusion.patches import layers_named, level_size, replaced_forwards
from resmaster_stages.diffusion.views import Grid


class Windows:
    """The windows of each level of a UNet: `window` x `window` latents on a canvas of `height` x `width` latents.

    jitter: `clamped` (windows are shifted inside the canvas), `zeros` (also beyond the canvas, where they see zero
    tokens) or `off`.
    """

    def __init__(
        self, height: int, width: int, window: int, jitter: str, generators: Sequence[torch.Generator]
    ) -> None:
        self.height, self.width, self.window = height, width, window
        self.jitter, self.generators = jitter, generators
        self._places = cache(self._draw)

    def grid(self, tokens: int) -> Grid:
        """The windows of the level that has `tokens` tokens."""
        rows, cols = level_size(self.height, self.width, tokens)
        window = max(1, round(self.window * rows / self.height))
        return Grid(rows, cols, window, max(1, window // 2))

    def _draw(self, tokens: int, index: int) -> list[Origins]:
        """The origins of each sample's windows at step `index`."""
        grid = self.grid(tokens)
        if self.jitter == "off":
            return [[(y, x) for y in grid.rows for x in grid.cols]] * len(self.generators)
        origins = [jittered(grid, generator) for generator in self.generators]
        return origins if self.jitter == "zeros" else [clamped(grid, each) for each in origins]

    def views(self, tokens: int, rows: int, call: DenoiserCall, device: torch.device) -> ScatteredViews:
        """The windows at the step of `call`, for its `rows` canvases of `tokens` tokens each, branch by branch."""
        origins = self._places(tokens, call.index)
        samples = call.canvases(len(origins))
        return ScatteredViews(
            self.grid(tokens), [origins[sample] for sample in samples] * (rows // len(samples)), "uniform", device
        )


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention of [N, T, C] -> [N, T, C]."""
    split = [each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key, value)]  # [N, heads, T, C / heads]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def windowed(query: Tensor, key: Tensor, value: Tensor, heads: int, views: ScatteredViews) -> Tensor:
    """Multi-head attention of [N, T, C] inside windows, averaged where windows overlap -> [N, T, C]."""
    size = (views.grid.height, views.grid.width)

    def cut(tokens: Tensor) -> Tensor:
        return views.cut(tokens.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)  # [N * windows, t, C]

    local = attend(cut(query), cut(key), cut(value), heads)
    window = (views.grid.window_height, views.grid.window_width)
    return views.fuse(local.transpose(1, 2).unflatten(2, window)).flatten(2).transpose(1, 2).to(query.dtype)


def interleaved(
    query: Tensor, key: Tensor, value: Tensor, heads: int, size: tuple[int, int], every: tuple[int, int]
) -> Tensor:
    """Multi-head attention of [N, T, C] among every n-th token alone, n = `every` along each axis -> [N, T, C].

    size: (height, width) of the T tokens. Each of the interleaved parts is computed on its own, because their sizes
    differ where a side is no multiple of n.
    """
    if every == (1, 1):
        return attend(query, key, value, heads)
    grids = [each.unflatten(1, size) for each in (query, key, value)]  # [N, height, width, C]
    out = torch.empty_like(grids[2])
    for y in range(min(every[0], size[0])):
        for x in range(min(every[1], size[1])):
            part = (slice(None), slice(y, None, every[0]), slice(x, None, every[1]))
            q, k, v = (grid[part].flatten(1, 2) for grid in grids)
            out[part] = attend(q, k, v, heads).unflatten(1, out[part].shape[1:3])
    return out.flatten(1, 2)


def blur_features(tokens: Tensor, radius: int) -> Tensor:
    """[N, T, C] blurred along C with standard deviation 1.

    The authors' kernel is three-dimensional: it blurs along C as well as along the canvas's two axes.
    """
    return gaussian_blur(tokens[:, None], radius, 1.0, axes=(3,))[:, 0]


@dataclass(frozen=True)
class Fusion:
    """How scales are fused."""

    windows: Windows
    radius: int
    """Of the blur, in tokens. With 0 the result is the windows' attention alone."""
    features: bool = False
    """Blur along the feature channels too."""
    every: tuple[int, int] = (1, 1)
    """Along each axis, global attention is among every n-th token. 1: among all."""


def _fused(attention: Any, plain: Callable[..., Tensor], call: DenoiserCall, fusion: Fusion) -> Callable[..., Tensor]:
    windows = fusion.windows

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, tokens, _ = x.shape
        grid = windows.grid(tokens)
        if len(grid) == 1:
            return plain(x, *args, **kwargs)
        query, key, value = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        size = (grid.height, grid.width)
        whole = attention.to_out[0](interleaved(query, key, value, attention.heads, size, fusion.every))
        local = windowed(query, key, value, attention.heads, windows.views(tokens, rows, call, x.device))
        difference = attention.to_out[0](local) - whole  # [N, T, C]
        canvas = difference.transpose(1, 2).unflatten(2, size)
        coarse = gaussian_blur(canvas, fusion.radius, 1.0).flatten(2).transpose(1, 2)
        return whole + (blur_features(coarse, fusion.radius) if fusion.features else coarse)

    return forward


@contextmanager
def scale_fusion(unet: Any, call: DenoiserCall, fusion: Fusion) -> Iterator[None]:
    """Within the block, every self-attention of the UNet is fused."""

    def forward_of(name: str, module: Any) -> Callable[..., Tensor]:
        return _fused(module, module.forward, call, fusion)

    with replaced_forwards(layers_named(unet, ".attn1"), forward_of):
        yield
