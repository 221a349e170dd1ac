"""Moving grids: at every step all views are shifted together, so that view borders never lie twice at the same place.

A seamless image then needs fewer views, because other steps, without a border at that place, average the border away.
The shifts are a low-discrepancy sequence (Roberts' R2) of the step's number alone. They are the same for all samples,
and nothing is drawn at random. Moving views may lie further apart than views that stand still. In the last steps, where
borders would show, the views can stand still.

Invariant: the size of the views is the same at every step. Their number is the same at all steps in which they move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.loop import Views, always
from resmaster_stages.diffusion.views import Grid, distance
from resmaster_stages.models.schedule import Step

PLASTIC = 1.32471795724474602596
"""The real root of x^3 = x + 1. The steps of R2 are its inverse and the square of its inverse."""


def shift_at(number: int, stride: int) -> tuple[int, int]:
    """How far the views of step `number` are moved up and left, each from 0 to `stride` - 1."""
    return int(number / PLASTIC % 1.0 * stride), int(number / PLASTIC**2 % 1.0 * stride)


def nearest_views(moved: Grid, grid: Grid) -> list[int]:
    """For each view of `moved`, the number of the view of `grid` with the nearest corner (the first of equals)."""

    def nearest(place: int, origins: tuple[int, ...], length: int, wraps: bool) -> int:
        return min(range(len(origins)), key=lambda i: distance(origins[i], place, length, wraps))

    rows = [nearest(y, grid.rows, grid.height, grid.wraps[0]) for y in moved.rows]
    cols = [nearest(x, grid.cols, grid.width, grid.wraps[1]) for x in moved.cols]
    return [row * len(grid.cols) + col for row in rows for col in cols]


def placed(
    grid: Grid,
    conditions: Conditions,
    fuse: str,
    device: torch.device,
    *,
    moving: Grid | None = None,
    stop: float = 1.0,
) -> Callable[[Step], tuple[Views, Conditions]]:
    """A view group's views and conditions at each step (`ViewGroup.at`).

    Without `moving` they are those of `grid` at every step. With `moving` (a grid at shift 0), they are those of the
    moved grid before the fraction `stop` of the steps, and those of `grid` from there on. A moved view has the caption,
    image prompt and size conditions of the nearest view of `grid`. fuse: as `Fuser` takes it.
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
        return Fuser(there, fuse, device), conditions.take(items)

    return lambda step: moved(*shift_at(step.index, moving.stride)) if step.done < stop else still
