"""Views beyond the regular grid: windows that are shifted at random at every step, and interleaved (dilated) views.

All implement the loop's `Views`: they cut and fuse canvases, sample by sample, then view by view.

Invariants:
- The number of views and their size never change, so the UNet sees one static shape.
- `fuse(cut(canvas)) == canvas` up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.diffusion.fusing import window_weights
from resmaster_stages.diffusion.views import Grid

Origins = list[tuple[int, int]]
"""(y0, x0) of each window, row-major."""


def _shift(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def jittered(grid: Grid, generator: torch.Generator) -> Origins:
    """The grid's windows, each shifted by up to a quarter of the neighbours' overlap: DemoFusion's random crops.

    Inner windows are shifted either way. Border windows are shifted outwards only (beyond the canvas). Along an axis
    with a single window nothing is shifted.
    """
    reach = jitter_reach(grid)

    def place(origins: tuple[int, ...], index: int) -> int:
        if len(origins) == 1:
            return origins[0]
        low = -reach if index < len(origins) - 1 else 0
        high = reach if index > 0 else 0
        return origins[index] + _shift(generator, low, high)

    return [
        (place(grid.rows, row), place(grid.cols, col)) for row in range(len(grid.rows)) for col in range(len(grid.cols))
    ]


def jitter_reach(grid: Grid) -> int:
    """The largest shift of a window, in units of the grid."""
    return (grid.window - grid.stride) // 4


def clamped(grid: Grid, origins: Origins) -> Origins:
    """`origins`, moved inside the canvas where they lie beyond it."""
    bottom, right = grid.height - grid.window_height, grid.width - grid.window_width
    return [(min(max(y, 0), bottom), min(max(x, 0), right)) for y, x in origins]


@lru_cache(maxsize=64)
def _window(kind: str, height: int, width: int, overlap: int, device: torch.device) -> Tensor:
    """Weight of each cell of a window [height, width], kept because uploading it at every step would make the device
    wait."""
    rows, cols = (window_weights(kind, side, overlap) for side in (height, width))
    return (rows[:, None] * cols).float().to(device)


class ScatteredViews:
    """Windows at arbitrary places, different for each sample. Beyond the canvas, a window sees zeros.

    origins: the windows of each sample, the same number for all. kind: weights of a window's cells where windows
    overlap, as `window_weights` names them.
    """

    def __init__(self, grid: Grid, origins: Sequence[Origins], kind: str, device: torch.device | str = "cpu") -> None:
        self.grid, self.origins = grid, origins
        self.margin = jitter_reach(grid)
        overlap = grid.window - grid.stride
        self.weight = _window(kind, grid.window_height, grid.window_width, overlap, torch.device(device))

    def _box(self, origin: tuple[int, int]) -> tuple[slice, slice]:
        y, x = origin[0] + self.margin, origin[1] + self.margin
        return slice(y, y + self.grid.window_height), slice(x, x + self.grid.window_width)

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * views, C, wh, ww]."""
        padded = F.pad(canvas, (self.margin,) * 4)
        boxes = [(sample, *self._box(o)) for sample, origins in enumerate(self.origins) for o in origins]
        return torch.stack([padded[sample, :, rows, cols] for sample, rows, cols in boxes])

    def fuse(self, views: Tensor) -> Tensor:
        """[B * views, C, wh, ww] -> [B, C, H, W], the weighted average, float32, added up in a fixed order."""
        margin, (height, width) = self.margin, (self.grid.height, self.grid.width)
        total = views.new_zeros(
            len(self.origins), views.shape[1], height + 2 * margin, width + 2 * margin, dtype=torch.float32
        )
        weight = torch.zeros_like(total[:, :1])  # [B, 1, H + 2 m, W + 2 m]
        each = iter(views.float())
        for sample, origins in enumerate(self.origins):
            for origin in origins:
                rows, cols = self._box(origin)
                total[sample, :, rows, cols] += next(each) * self.weight
                weight[sample, :, rows, cols] += self.weight
        inside = (..., slice(margin, margin + height), slice(margin, margin + width))
        return total[inside] / weight[inside]


class InterleavedViews:
    """`factor` x `factor` views, each of which takes every `factor`-th cell of the canvas (dilated sampling).

    So each view shows the whole image at native size. A canvas is padded with zeros at the top and left until the sides
    of the views are multiples of `multiple` cells.
    """

    def __init__(self, height: int, width: int, factor: int, multiple: int = 1) -> None:
        self.height, self.width, self.factor = height, width, factor
        self.period = factor * multiple
        """The sides of the padded canvas are multiples of this."""

    def __len__(self) -> int:
        return self.factor**2

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * k * k, C, h, w], the size of `views.interleaved_size`."""
        k = self.factor
        padded = F.pad(canvas, (-self.width % self.period, 0, -self.height % self.period, 0))
        cells = padded.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # [B, C, h, k, w, k]
        return cells.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)

    def fuse(self, views: Tensor) -> Tensor:
        """[B * k * k, C, h, w] -> [B, C, H, W], float32."""
        k = self.factor
        cells = views.float().unflatten(0, (-1, k, k)).permute(0, 3, 4, 1, 5, 2)  # [B, C, h, k, w, k]
        return cells.flatten(4, 5).flatten(2, 3)[..., -self.height :, -self.width :]


def shuffle_order(views: int, size: Sequence[int], generator: torch.Generator, device: torch.device | str) -> Tensor:
    """A random order of `views` views at each cell of `size` (channels, height, width): [views, *size], long."""
    draws = torch.rand((views, *size), generator=generator)
    return draws.to(device).argsort(dim=0, stable=True)  # stable, so that all devices find the same order


class Shuffled:
    """Views that exchange their cells: view v is shown, at each cell, what view `order`[v] has there.

    Fused are predictions, each of which goes back to the view that its cell came from.

    order: [B, views, channels or 1, h, w], at each cell of a sample a permutation of its views.
    """

    def __init__(self, views: InterleavedViews, order: Tensor) -> None:
        self.views, self.order = views, order

    def _moved(self, cells: Tensor, order: Tensor) -> Tensor:
        grouped = cells.unflatten(0, (-1, len(self.views)))  # [B, views, C, h, w]
        return grouped.gather(1, order.expand_as(grouped)).flatten(0, 1)

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, H, W] -> [B * views, C, h, w]."""
        return self._moved(self.views.cut(canvas), self.order)

    def fuse(self, views: Tensor) -> Tensor:
        """[B * views, C, h, w] -> [B, C, H, W], float32."""
        return self.views.fuse(self._moved(views, self.order.argsort(dim=1)))
