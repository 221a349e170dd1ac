"""Neighbourhood attention (ScaleDiff): every place attends to the native-size window around it, and to no more.

    out[tile] = softmax(q[tile] k[window of the tile]^T / sqrt(d)) v[window of the tile]

Queries are cut into tiles of half a window that do not overlap. The window of a tile lies around the tile, and at the
canvas's border it is moved inside. All projections are computed once on the canvas, so convolutions, cross-attention
and feed-forward layers still see the canvas in one piece. Of self-attention the cost then grows with the canvas's area
instead of with the area's square. This module does not depend on a method.

A method that predicts whole canvases uses it as one of its patches:

    tiles = Tiles(*request.canvas_size, request.models.geometry.native, jitter=True)
    patches = (partial(neighbourhood, tiles=tiles),)

Such a method needs the ability `attention` (`Diffusion.needs`).

Invariants:
- A layer whose canvas fits into one window stays plain, with the same bytes. All layers are restored at the end of the
  block.
- No window sees anything from beyond the canvas. Nothing is drawn at random: a jittered lattice of tiles moves by
  `shift_at` of the step's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resmaster_stages.diffusion.guidance import DenoiserCall
from resmaster_stages.diffusion.patches import layers_named, level_of, replaced_forwards
from resmaster_stages.diffusion.scale_fusion import attend
from resmaster_stages.diffusion.shifted_views import shift_at


@dataclass(frozen=True)
class Axis:
    """The tiles and windows along one axis of `length` tokens, if the first tile begins `shift` tokens before the axis.

    An axis that is no longer than the window is one tile, which sees all of it.
    """

    length: int
    window: int
    shift: int = 0

    @property
    def tile(self) -> int:
        """Length of a tile."""
        return self.length if self.length <= self.window else max(1, self.window // 2)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-(self.length + self.shift) // self.tile)

    def starts(self) -> Tensor:
        """Where each tile begins: [tiles]. The first and the last tile may reach beyond the axis."""
        return torch.arange(self.tiles) * self.tile - self.shift

    def queries(self) -> Tensor:
        """The token that each place of each tile asks for: [tiles, tile]. Places beyond the axis repeat its border."""
        return (self.starts()[:, None] + torch.arange(self.tile)).clamp(0, self.length - 1)

    def keys(self) -> Tensor:
        """The tokens of each tile's window: [tiles, window]."""
        window = min(self.window, self.length)
        margin = (window - self.tile) // 2
        return (self.starts() - margin).clamp(0, self.length - window)[:, None] + torch.arange(window)

    def places(self) -> Tensor:
        """(tile, place in the tile) of each token: [length, 2]."""
        place = torch.arange(self.length) + self.shift
        return torch.stack([place // self.tile, place % self.tile], dim=-1)


@dataclass(frozen=True)
class Level:
    """Which tokens of a level are asked for and seen by which tile, as numbers in row-major order."""

    queries: Tensor  # [tiles, t], long
    keys: Tensor  # [tiles, w], long
    back: Tensor  # [T], long: where each token is among the tiles' flattened queries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Multi-head attention of [N, T, C], each tile to its window -> [N, T, C].

        Tiles are computed in parts whose windows hold at most as many tokens as the canvas, or one tile at a time. So
        the gathered keys and values take no more memory than the canvas's own.
        """
        rows, tokens, _ = query.shape
        at_once = max(1, tokens // self.keys.shape[1])
        parts = []
        for asked, seen in zip(self.queries.split(at_once), self.keys.split(at_once)):
            q, k, v = (each[:, index].flatten(0, 1) for each, index in ((query, asked), (key, seen), (value, seen)))
            parts.append(attend(q, k, v, heads).unflatten(0, (rows, -1)))  # [N, tiles of the part, t, C]
        return torch.cat(parts, dim=1).flatten(1, 2)[:, self.back]


@lru_cache(maxsize=16)
def level(rows: Axis, cols: Axis, device: torch.device) -> Level:
    """The tiles of a level, kept for all its layers, and without jitter for all steps."""

    def product(down: Tensor, across: Tensor) -> Tensor:
        """Numbers of the tokens of each pair of [a, b] and [c, d] tokens along the axes: [a * c, b * d]."""
        return (down[:, None, :, None] * cols.length + across[None, :, None, :]).flatten(2).flatten(0, 1)

    (tile_y, y), (tile_x, x) = rows.places().unbind(-1), cols.places().unbind(-1)
    tile = tile_y[:, None] * cols.tiles + tile_x  # [rows, cols]
    back = tile * rows.tile * cols.tile + y[:, None] * cols.tile + x
    return Level(
        product(rows.queries(), cols.queries()).to(device, non_blocking=True),
        product(rows.keys(), cols.keys()).to(device, non_blocking=True),
        back.flatten().to(device, non_blocking=True),
    )


@dataclass(frozen=True)
class Tiles:
    """The tiles of each level of a UNet, on a canvas of `height` x `width` latents with windows of `window` latents.

    jitter: the lattice of tiles moves from step to step, so that tile borders never lie twice at the same place.
    """

    height: int
    width: int
    window: int
    jitter: bool = False

    def axes(self, tokens: int, step: int = 0) -> tuple[Axis, Axis]:
        """The vertical and the horizontal axis of the level with `tokens` tokens, at the step number `step`."""
        factor = 2 ** level_of(self.height, self.width, tokens)
        window = -(-self.window // factor)
        lengths = [-(-side // factor) for side in (self.height, self.width)]
        shift = shift_at(step, max(1, window // 2)) if self.jitter else (0, 0)
        down, across = (Axis(n, window, s if n > window else 0) for n, s in zip(lengths, shift))
        return down, across


def _layer(attention: Any, plain: Callable[..., Tensor], call: DenoiserCall, tiles: Tiles) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, cols = tiles.axes(x.shape[1], call.index)
        if rows.tiles == cols.tiles == 1:
            return plain(x, *args, **kwargs)
        query, key, value = attention.to_q(x), attention.to_k(x), attention.to_v(x)
        near = level(rows, cols, x.device).attend(query, key, value, attention.heads)
        return attention.to_out[0](near)

    return forward


@contextmanager
def neighbourhood(unet: Any, call: DenoiserCall, tiles: Tiles) -> Iterator[None]:
    """Within the block, every self-attention of the UNet sees the neighbourhood of each place alone."""

    def forward_of(name: str, module: Any) -> Callable[..., Tensor]:
        return _layer(module, module.forward, call, tiles)

    with replaced_forwards(layers_named(unet, ".attn1"), forward_of):
        yield
