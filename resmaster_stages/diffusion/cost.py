"""Counts what images cost in UNet evaluations. The count happens where the UNet is called, so it covers every method.

The counts depend on `view_batch` (a short batch repeats a view), so they belong to commit records, not to samples.
This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class UnetCost:
    """A running count."""

    calls: int = 0
    """Forward passes, those of a ControlNet included."""
    rows: int = 0
    """Views through the UNet in all forward passes, counted once per guidance branch; repeats of short batches
    count."""
    native_rows: float = 0.0
    """`rows` in units of a view of the native area through the UNet. Compare methods with views of different sizes by
    this number."""


@dataclass(frozen=True)
class UnetWork:
    """A method's forecast of its UNet evaluations of one size: what `UnetCost` counts with `view_batch: 1`."""

    rows: int
    """Views through the UNet, counted once per guidance branch."""
    area: float
    """Area of each view, in units of the native area."""
    share: float = 1.0
    """Work of a row, in units of the UNet's for the same area."""

    @property
    def native_rows(self) -> float:
        """`rows` in units of a view of the native area through the UNet."""
        return self.rows * self.area * self.share


CONTROL_SHARE = 0.44
"""`UnetWork.share` of a ControlNet that is a copy of SDXL's encoder, whose control image is embedded already."""

_counter: ContextVar[UnetCost | None] = ContextVar("unet_cost", default=None)


@contextmanager
def counting() -> Iterator[UnetCost]:
    """Yields a count of all UNet calls within the block."""
    cost = UnetCost()
    token = _counter.set(cost)
    try:
        yield cost
    finally:
        _counter.reset(token)


def count_call(rows: int, area: float, share: float = 1.0) -> None:
    """Adds one call of `rows` views, each `area` times the native area, to the current count. share: as
    `UnetWork.share`."""
    cost = _counter.get()
    if cost is not None:
        cost.calls += 1
        cost.rows += rows
        cost.native_rows += rows * area * share
