"""Cuts a canvas into views and fuses views back into a canvas, as a weighted average where views overlap.

A weight is the product of one weight per axis, so cutting and fusing work along one axis after the other. That takes
rows + columns operations instead of rows x columns. Their order is fixed, so fusing is deterministic on GPUs too (an
index_add would not be).

Invariants:
- Weights are positive and sum to one at every cell of the canvas: `fuse(cut(canvas)) == canvas` up to rounding, and
  exactly with one view.
"""

from __future__ import annotations

import itertools

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


Place = tuple[tuple[slice, slice], ...]
"""Where a window lies along one axis: pieces of the canvas, and of the window. A window that crosses the border has
two pieces."""


def _place(origin: int, window: int, length: int) -> Place:
    """The place of a window of `window` cells that begins at the cell `origin` of an axis of `length` cells."""
    inside = min(window, length - origin)
    place = ((slice(origin, origin + inside), slice(0, inside)),)
    return place if inside == window else (*place, (slice(0, window - inside), slice(inside, window)))


def _taken(x: Tensor, place: Place, dim: int) -> Tensor:
    """The window at `place` along the axis `dim` of `x`; a view of `x` if it does not cross the border."""
    parts = [x.narrow(dim, there.start, there.stop - there.start) for there, _ in place]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _shares(places: tuple[Place, ...], window: Tensor, length: int) -> Tensor:
    """Each window's share of the average along one axis: [windows, window], float64."""
    total = torch.zeros(length, dtype=torch.float64)
    for place in places:
        for there, here in place:
            total[there] += window[here]
    return torch.stack([window / _taken(total, place, 0) for place in places])


class Fuser:
    """Cuts and fuses canvases of one grid.

    `scale` is the number of cells per unit of the grid, so that one grid can serve latents and pixels.
    """

    def __init__(self, grid: Grid, kind: str, device: torch.device | str = "cpu", scale: int = 1) -> None:
        self.grid = grid
        self.height, self.width = grid.height * scale, grid.width * scale
        self.window_height, self.window_width = grid.window_height * scale, grid.window_width * scale
        self.rows = tuple(_place(y * scale, self.window_height, self.height) for y in grid.rows)
        self.cols = tuple(_place(x * scale, self.window_width, self.width) for x in grid.cols)
        overlap = (grid.window - grid.stride) * scale
        row_window = window_weights(kind, self.window_height, overlap)
        col_window = window_weights(kind, self.window_width, overlap)
        self._row_shares = _shares(self.rows, row_window, self.height).float().to(device)  # [R, wh]
        self._col_shares = _shares(self.cols, col_window, self.width).float().to(device)  # [K, ww]

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * views, C, wh, ww], sample by sample, the views of a sample in row-major order."""
        strips = torch.stack([_taken(canvas, row, 2) for row in self.rows], dim=1)  # [B, R, C, wh, W]
        views = torch.stack([_taken(strips, col, 4) for col in self.cols], dim=2)  # [B, R, K, C, wh, ww]
        return views.flatten(0, 2)

    def cut_row(self, canvas: Tensor, row: int) -> Tensor:
        """[B, C, H, W] -> [B * columns, C, wh, ww]: one row of views, for canvases too large to be cut at once."""
        strip = _taken(canvas, self.rows[row], 2)  # [B, C, wh, W]
        return torch.stack([_taken(strip, col, 3) for col in self.cols], dim=1).flatten(0, 1)

    def add_row(self, canvas: Tensor, views: Tensor, row: int) -> None:
        """Adds the weighted `views` [B * columns, C, wh, ww] of one row to `canvas` [B, C, H, W], in place."""
        grouped = views.to(canvas.dtype).unflatten(0, (-1, len(self.cols)))  # [B, K, C, wh, ww]
        row_share = self._row_shares[row][:, None]
        for col, place in enumerate(self.cols):
            weighted = grouped[:, col] * (row_share * self._col_shares[col])
            for (down, rows), (across, cols) in itertools.product(self.rows[row], place):
                canvas[:, :, down, across] += weighted[:, :, rows, cols]

    def fuse(self, views: Tensor) -> Tensor:
        """[B * views, C, wh, ww] -> [B, C, H, W], the weighted average of the views, in float32."""
        grouped = views.float().unflatten(0, (-1, len(self.rows), len(self.cols)))  # [B, R, K, C, wh, ww]
        batch, _, _, channels, window_height, _ = grouped.shape
        strips = grouped.new_zeros(batch, len(self.rows), channels, window_height, self.width)  # [B, R, C, wh, W]
        for col, place in enumerate(self.cols):
            weighted = grouped[:, :, col] * self._col_shares[col]
            for there, here in place:
                strips[..., there] += weighted[..., here]
        canvas = grouped.new_zeros(batch, channels, self.height, self.width)
        for row, place in enumerate(self.rows):
            weighted = strips[:, row] * self._row_shares[row][:, None]
            for there, here in place:
                canvas[:, :, there] += weighted[:, :, here]
        return canvas
