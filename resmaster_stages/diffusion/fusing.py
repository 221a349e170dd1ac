"""Cuts a canvas into views and fuses views back into a canvas, as a weighted average where views overlap.

A weight is the product of one weight per axis, so cutting and fusing work along one axis after the other. That takes
rows + columns operations instead of rows x columns. Their order is fixed, so fusing is deterministic on GPUs too (an
index_add would not be).

Invariants:
- Weights are positive and sum to one at every cell of the canvas: `fuse(cut(canvas)) == canvas` up to rounding, and
  exactly with one view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmaster_stages.diffusion.views import Grid

WEIGHTS = ("uniform", "linear", "gaussian", "narrow", "cosine", "feather")
"""The kinds of weights."""

_SPREADS = {"gaussian": 1 / 4, "narrow": 1 / 10}
"""Standard deviation of Gaussian weights, as a fraction of the window."""


def window_weights(kind: str, length: int, overlap: int) -> Tensor:
    """Weight of each of `length` cells of a window along one axis: [length], float64, positive.

    uniform: 1 (MultiDiffusion). linear: ramps of `overlap` cells at both ends. gaussian: standard deviation length / 4.
    narrow: standard deviation length / 10 (Mixture of Diffusers, variance 0.01 of the squared length). cosine: half a
    wave. feather: 1, blurred with zeros beyond both ends, standard deviation length / 16 (PixelRush).
    """
    position = torch.arange(length, dtype=torch.float64) + 0.5
    to_edge = torch.minimum(position, length - position)
    if kind == "uniform":
        return torch.ones(length, dtype=torch.float64)
    if kind == "linear":
        return (to_edge / overlap).clamp(max=1.0) if overlap > 0 else torch.ones(length, dtype=torch.float64)
    if kind in _SPREADS:
        return torch.exp(-0.5 * ((position - length / 2) / (length * _SPREADS[kind])) ** 2)
    if kind == "cosine":
        return torch.cos(torch.pi * (position - length / 2) / length)
    if kind == "feather":
        reach = round(2.5 * length / 16)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / (length / 16)) ** 2)
        inside = torch.ones(1, 1, length, dtype=torch.float64)
        return torch.nn.functional.conv1d(inside, (taps / taps.sum())[None, None], padding=reach)[0, 0]
    raise ValueError(f"unknown weights {kind!r}; known: {', '.join(WEIGHTS)}")


def _shares(origins: tuple[int, ...], window: Tensor, length: int) -> Tensor:
    """Each window's share of the average along one axis: [windows, window], float64."""
    total = torch.zeros(length, dtype=torch.float64)
    for origin in origins:
        total[origin : origin + len(window)] += window
    return torch.stack([window / total[origin : origin + len(window)] for origin in origins])


class Fuser:
    """Cuts and fuses canvases of one grid.

    `scale` is the number of cells per unit of the grid, so that one grid can serve latents and pixels.
    """

    def __init__(self, grid: Grid, kind: str, device: torch.device | str = "cpu", scale: int = 1) -> None:
        self.grid = grid
        self.rows = tuple(y * scale for y in grid.rows)
        self.cols = tuple(x * scale for x in grid.cols)
        self.height, self.width = grid.height * scale, grid.width * scale
        self.window_height, self.window_width = grid.window_height * scale, grid.window_width * scale
        overlap = (grid.window - grid.stride) * scale
        row_window = window_weights(kind, self.window_height, overlap)
        col_window = window_weights(kind, self.window_width, overlap)
        self._row_shares = _shares(self.rows, row_window, self.height).float().to(device)  # [R, wh]
        self._col_shares = _shares(self.cols, col_window, self.width).float().to(device)  # [K, ww]

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * views, C, wh, ww], sample by sample, the views of a sample in row-major order."""
        strips = torch.stack([canvas[:, :, y : y + self.window_height] for y in self.rows], dim=1)  # [B, R, C, wh, W]
        views = torch.stack([strips[..., x : x + self.window_width] for x in self.cols], dim=2)  # [B, R, K, C, wh, ww]
        return views.flatten(0, 2)

    def cut_row(self, canvas: Tensor, row: int) -> Tensor:
        """[B, C, H, W] -> [B * columns, C, wh, ww]: one row of views, for canvases too large to be cut at once."""
        strip = canvas[:, :, self.rows[row] : self.rows[row] + self.window_height]  # [B, C, wh, W]
        return torch.stack([strip[..., x : x + self.window_width] for x in self.cols], dim=1).flatten(0, 1)

    def add_row(self, canvas: Tensor, views: Tensor, row: int) -> None:
        """Adds the weighted `views` [B * columns, C, wh, ww] of one row to `canvas` [B, C, H, W], in place."""
        grouped = views.to(canvas.dtype).unflatten(0, (-1, len(self.cols)))  # [B, K, C, wh, ww]
        target = canvas[:, :, self.rows[row] : self.rows[row] + self.window_height]
        row_share = self._row_shares[row][:, None]
        for col, x in enumerate(self.cols):
            target[..., x : x + self.window_width] += grouped[:, col] * (row_share * self._col_shares[col])

    def fuse(self, views: Tensor) -> Tensor:
        """[B * views, C, wh, ww] -> [B, C, H, W], the weighted average of the views, in float32."""
        grouped = views.float().unflatten(0, (-1, len(self.rows), len(self.cols)))  # [B, R, K, C, wh, ww]
        batch, _, _, channels, window_height, window_width = grouped.shape
        strips = grouped.new_zeros(batch, len(self.rows), channels, window_height, self.width)  # [B, R, C, wh, W]
        for col, x in enumerate(self.cols):
            strips[..., x : x + window_width] += grouped[:, :, col] * self._col_shares[col]
        canvas = grouped.new_zeros(batch, channels, self.height, self.width)
        for row, y in enumerate(self.rows):
            canvas[:, :, y : y + window_height] += strips[:, row] * self._row_shares[row][:, None]
        return canvas
