"""Estimates the device memory that a denoiser call needs, and from that the number of views per call.

A row is one view by one guidance branch. The base model says how much memory a row takes (`Base.row_bytes`).

Invariant: the number of views depends on the device's total memory and the model, not on the memory that happens to be
free. So a re-run on the same kind of device has the same batches, and hence the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resmaster_stages.diffusion.views import Grid
from resmaster_stages.models.parts import Models

CPU_VIEWS = 16
"""Views per call on a device without memory of its own. On CPUs larger batches are not faster."""

USABLE = 0.85
"""Share of a device's memory that is planned with. The rest is for libraries, fragmentation and the images."""


def weights_bytes(models: Models) -> int:
    """Memory in bytes of the weights that are on the device while the denoiser computes."""
    working = (models.base.denoiser, models.control_net)
    parts = [part for part in models.parts if any(part is each for each in (*working, *models.resident))]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def device_bytes(device: torch.device) -> int | None:
    """Total memory of the device in bytes. None if it has no memory of its own, or does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return None


@dataclass(frozen=True)
class Need:
    """The memory that views of one size need on a device with `total` bytes."""

    weights: int
    view: int
    """Bytes per view, for all of its rows."""
    total: int

    def bytes(self, views: int) -> int:
        """Bytes that `views` views in one call need."""
        return self.weights + views * self.view

    @property
    def fitting(self) -> int:
        """The number of views that fit into one call, at least one."""
        return max(1, int((USABLE * self.total - self.weights) // self.view))

    def sentence(self, views: int, device: str, automatic: bool) -> str:
        """A line for the user: the memory that `views` views need on `device`, and the remedy if it is too little."""
        need = (
            f"{views} at a time need about {self.bytes(views) / 1e9:.0f} GB, and {device} has {self.total / 1e9:.0f} GB"
        )
        if views <= self.fitting:
            return need
        return f"{need}: {self.fitting} at a time" if automatic else f"{need}; set upscale.view_batch: {self.fitting}"


def need_of(models: Models, window: tuple[int, int], branches: int) -> Need | None:
    """The memory need of views of `window` (height, width) latents with `branches` guidance branches.

    None if the device has no memory of its own, or the base model does not know how much memory a row takes.
    """
    total = device_bytes(models.device)
    row = None if total is None else models.base.row_bytes(*window)
    return None if total is None or row is None else Need(weights_bytes(models), branches * row, total)


def view_limit(models: Models, limit: int | None, window: tuple[int, int], branches: int) -> int:
    """The most views per denoiser call: `limit` (`Diffusion.view_batch`), or if it is None, as many as fit into the
    device's memory."""
    if limit is not None:
        return limit
    need = need_of(models, window, branches)
    return CPU_VIEWS if need is None else need.fitting


def preflight(models: Models, limit: int | None, grid: Grid, branches: int) -> list[str]:
    """Lines for the user about an image with the views of `grid`: the memory that it needs, and settings that slow it
    down. Empty if `need_of` is None."""
    need = need_of(models, grid.window_size, branches)
    if need is None:
        return []
    name = torch.cuda.get_device_name(models.device) if models.device.type == "cuda" else models.device.type
    views = min(len(grid), limit or len(grid))
    lines = [f"{grid.height_px} x {grid.width_px} px in {len(grid)} views: {need.sentence(views, name, limit is None)}"]
    if models.base.vae.dtype == torch.float16 and getattr(models.base.vae.config, "force_upcast", False):
        lines.append(
            "the VAE overflows in float16 and computes in float32, several times slower; set model.vae to one that is "
            "safe, such as madebyollin/sdxl-vae-fp16-fix for SDXL"
        )
    return lines
