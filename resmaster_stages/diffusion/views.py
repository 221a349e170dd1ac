"""Views: overlapping windows on a canvas, in row-major order.

The last window along each axis is pulled back so that it ends at the border. Along an axis that wraps, windows lie at
equal distances instead, and cross the border. This module does not import torch, so that the captions stage and the
engine can share one grid.

Invariants:
- Boxes are half-open `(y0, x0, y1, x1)`, all of one size, and together they cover the canvas. They begin inside the
  canvas. They end inside it too, but along an axis that wraps: a box that ends beyond the border continues at the
  opposite border.
- The grid is the product of its rows and columns. View `i` is in row `i // cols` and column `i % cols`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.wrap import Axes, wrap_of
from resmaster_stages.models.bases.base import Geometry

Box = tuple[int, int, int, int]
"""Half-open (y0, x0, y1, x1)."""


def axis_origins(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Start of each window along one axis, every `stride` units. The last window is pulled back to end at `length`."""
    if length <= window:
        return (0,)
    origins = list(range(0, length - window, stride))
    return (*origins, length - window)


def shifted_origins(length: int, window: int, stride: int, shift: int) -> tuple[int, ...]:
    """`axis_origins` moved back by `shift` (0 to stride - 1) and kept inside the canvas.

    The number of windows is the same for every shift.
    """
    if length <= window:
        return (0,)
    count = 1 + -(-(length - window + stride - 1) // stride)
    return tuple(min(max(i * stride - shift, 0), length - window) for i in range(count))


def wrapped_origins(length: int, window: int, stride: int, shift: int = 0) -> tuple[int, ...]:
    """Start of each window along an axis that wraps: as many as it takes at distances of at most `stride`, all at about
    the same distance, moved back by `shift`.

    An axis shorter than the window has as many windows, each of the axis's length, as an axis of the window's length.
    """
    count = min(length, -(-max(length, window) // stride))
    return tuple((i * length // count - shift) % length for i in range(count))


def distance(a: float, b: float, length: float, wraps: bool) -> float:
    """How far two places on an axis are apart: on an axis that wraps, by the shorter way."""
    apart = abs(a - b)
    return min(apart, abs(length - apart)) if wraps else apart


@dataclass(frozen=True)
class Grid:
    """Windows of `window` x `window` units, every `stride` units, on a canvas of `height` x `width` units.

    An axis shorter than the window has one window of the axis's length. `unit_px` is the size of a unit in pixels
    (1, or the latent factor). `height_px` and `width_px` are the size of the image, which the canvas may exceed by
    padding. `shift` moves all windows up and left by less than a stride, inside the canvas. `multiple` is
    `Geometry.multiple`. `wraps` says whether the canvas continues at the opposite border, along its height and along
    its width. Such an axis has no padding.
    """

    height: int
    width: int
    window: int
    stride: int
    unit_px: int = 1
    height_px: int | None = None
    width_px: int | None = None
    shift: tuple[int, int] | None = None
    multiple: int = 1
    wraps: Axes = (False, False)

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.window, self.stride, self.unit_px) < 1 or self.stride > self.window:
            raise ValueError(f"not a grid that covers its canvas: {self}")

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """y0 of each row of windows."""
        return self._origins(self.height, 0)

    @cached_property
    def cols(self) -> tuple[int, ...]:
        """x0 of each column of windows."""
        return self._origins(self.width, 1)

    def _origins(self, length: int, axis: int) -> tuple[int, ...]:
        if self.wraps[axis]:
            return wrapped_origins(length, self.window, self.stride, self.shift[axis] if self.shift else 0)
        if self.shift is None:
            return axis_origins(length, self.window, self.stride)
        return shifted_origins(length, self.window, self.stride, self.shift[axis])

    @property
    def window_height(self) -> int:
        """Height of every window, in units."""
        return min(self.window, self.height)

    @property
    def window_width(self) -> int:
        """Width of every window, in units."""
        return min(self.window, self.width)

    @property
    def window_size(self) -> tuple[int, int]:
        """(height, width) of every window, in units."""
        return self.window_height, self.window_width

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Half-open (y0, x0, y1, x1) of each window, in units, row-major."""
        return tuple((y, x, y + self.window_height, x + self.window_width) for y in self.rows for x in self.cols)

    @cached_property
    def canvas_boxes(self) -> tuple[Box, ...]:
        """`boxes` in pixels of the canvas, padding included, so all of one size."""
        unit = self.unit_px
        return tuple((y0 * unit, x0 * unit, y1 * unit, x1 * unit) for y0, x0, y1, x1 in self.boxes)

    @cached_property
    def pixel_boxes(self) -> tuple[Box, ...]:
        """`boxes` in pixels, without the canvas's padding, so those at the border may be smaller."""
        ends = [sys.maxsize if wraps else size for wraps, size in zip(self.wraps, self.size_px)]
        return tuple((y0, x0, min(y1, ends[0]), min(x1, ends[1])) for y0, x0, y1, x1 in self.canvas_boxes)

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the image, in pixels."""
        return self.height_px or self.height * self.unit_px, self.width_px or self.width * self.unit_px

    @property
    def name(self) -> str:
        """The grid in pixels as `HxW/window/stride`, which the captions table stores; with `/wrap` if it wraps."""
        height, width = self.size_px
        name = f"{height}x{width}/{self.window * self.unit_px}/{self.stride * self.unit_px}"
        return f"{name}/{wrap_of(self.wraps)}" if any(self.wraps) else name

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)


def stride_of(window: int, fraction: float) -> int:
    """`fraction` of a window in whole units, at least 1 and at most the window."""
    return min(window, max(1, round(window * fraction)))


def target_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) in px of the high-res image for a low-res image of `height` x `width` px."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def view_grid(geometry: Geometry, height: int, width: int, stride: float, wraps: Axes = (False, False)) -> Grid:
    """The views of a target of `height` x `width` px, in latents: windows of the native size.

    `stride` is the distance of neighbouring windows, as a fraction of the native size. If a side of the target is not a
    multiple of `geometry.step_px`, the canvas is padded up to the next multiple. wraps: as `Grid` has it.
    """
    rows, cols = canvas_size(geometry, height, width)
    window = max(1, geometry.native // geometry.multiple) * geometry.multiple
    return Grid(
        height=rows,
        width=cols,
        window=window,
        stride=stride_of(window, stride),
        unit_px=geometry.latent_factor,
        height_px=height,
        width_px=width,
        multiple=geometry.multiple,
        wraps=wraps,
    )


OTHER_SIZE = "choose another size or scale, or let this axis not wrap"
"""What to do about `why_not_wrapping`."""


def why_not_wrapping(geometry: Geometry, height: int, width: int, wraps: Axes) -> str:
    """Why an image of `height` x `width` px cannot continue at its opposite borders; "" if it can."""
    step = geometry.step_px
    for name, side, wrapped in (("height", height, wraps[0]), ("width", width, wraps[1])):
        if wrapped and side % step:
            return f"{name} {side} px is no multiple of {step}, so the image cannot wrap there"
    return ""


def canvas_size(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """(height, width) in latents of the canvas of a target of `height` x `width` px: multiples of
    `geometry.multiple`."""
    return -(-height // geometry.step_px) * geometry.multiple, -(-width // geometry.step_px) * geometry.multiple


def interleaved_size(height: int, width: int, factor: int, multiple: int = 1) -> tuple[int, int]:
    """(height, width) of views that take every `factor`-th cell of `height` x `width` cells: multiples of
    `multiple`."""
    period = factor * multiple
    return -(-height // period) * multiple, -(-width // period) * multiple


def whole_canvas(geometry: Geometry, height: int, width: int) -> Grid:
    """A grid whose only view is the whole canvas of a target of `height` x `width` px, in latents."""
    longer = max(canvas_size(geometry, height, width)) * geometry.latent_factor
    return view_grid(replace(geometry, native_px=longer), height, width, 1.0)


def native_size(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """(height, width) in px of an image of `height` x `width` px that is reduced to at most the native area: multiples
    of `Geometry.step_px`."""
    scale = min(1.0, geometry.native_px / (height * width) ** 0.5)
    rows, cols = (max(1, round(side * scale / geometry.step_px)) * geometry.step_px for side in (height, width))
    return rows, cols


def patch_grid(config: DatasetConfig, geometry: Geometry, height: int, width: int) -> Grid:
    """The patches of a target of `height` x `width` px that are captioned.

    With `captions.grid` `views` they are the upscaler's own views. With `tiles` they are windows of the same size side
    by side, where the last row and column are pulled back to end at the border.
    """
    stride = config.upscale.view_stride if config.captions.grid == "views" else 1.0
    return view_grid(geometry, height, width, stride, config.upscale.wraps)
