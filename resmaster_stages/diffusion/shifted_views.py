"""Grids that move: at every step all windows are shifted together, so view borders never lie twice at the same place.

Fewer views are needed for a seamless image, since every border is averaged away by the steps that have none there.
The shifts are a low-discrepancy sequence (Roberts' R2) of the step's number alone: the same for all samples, without a
draw. Moving views may lie further apart than those that stand still, and stand still in the last steps, where borders
would show. Knows nothing about models. Invariant: the size of the views is the same at every step, their number at all
moving steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.loop import Views, always
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.models.schedule import Step

PLASTIC = 1.32471795724474602596
"""The root of x^3 = x + 1: R2's steps are its inverse and the inverse's square."""


def shift_at(number: int, stride: int) -> tuple[int, int]:
    """How far the windows of a step are moved up and left, each from 0 to `stride` - 1."""
    return int(number / PLASTIC % 1.0 * stride), int(number / PLASTIC**2 % 1.0 * stride)


def nearest_views(moved: Grid, grid: Grid) -> list[int]:
    """For each of `moved`'s views the number of `grid`'s view whose corner is nearest (the first of equals)."""

    def nearest(place: int, origins: tuple[int, ...]) -> int:
        return min(range(len(origins)), key=lambda i: abs(origins[i] - place))

    return [nearest(y, grid.rows) * len(grid.cols) + nearest(x, grid.cols) for y in moved.rows for x in moved.cols]


def placed(
    grid: Grid,
    conditions: Conditions,
    fuse: str,
    device: torch.device,
    *,
    moving: Grid | None = None,
    stop: float = 1.0,
) -> Callable[[Step], tuple[Views, Conditions]]:
    """A view group's views and conditions: those of `grid` at every step; or before the fraction `stop` of the steps
    those of `moving` (which lies at shift 0), moved from step to step.

    A moved view takes caption, image prompt and size conditions of the grid's nearest view. fuse: as `Fuser` takes it.
    """
    still = Fuser(grid, fuse, device), conditions
    if moving is None:
        return always(*still)
    samples = len(conditions) // len(grid)

    @cache
    def moved(y: int, x: int) -> tuple[Views, Conditions]:
        there = replace(moving, shift=(y, x))
        near = nearest_views(there, grid)
        items = torch.tensor([sample * len(grid) + view for sample in range(samples) for view in near])
        return Fuser(there, fuse, device), conditions.take(items.to(device, non_blocking=True))

    return lambda step: moved(*shift_at(step.index, moving.stride)) if step.done < stop else still
