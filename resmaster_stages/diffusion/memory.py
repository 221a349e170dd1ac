"""What a call of the denoiser needs of a device's memory, and so how many views go into one.

A row is one view by one guidance branch. What it takes is the base model's knowledge (`Base.row_bytes`).

Invariant: the choice follows from the device's size and the model, not from what happens to be free: a re-run on the
same kind of device has the same batches, hence the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resmaster_stages.diffusion.views import Grid
from resmaster_stages.models.parts import Models

CPU_VIEWS = 16
"""Views per call where the device has no memory of its own. On CPUs greater batches are not faster."""

USABLE = 0.85
"""Share of a device's memory that is planned with; the rest is for libraries, fragments and the images themselves."""


def weights_bytes(models: Models) -> int:
    """Memory in bytes of the parts that are on the device while the denoiser computes."""
    parts = (models.base.denoiser,) if models.offload else models.parts
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def device_bytes(device: torch.device) -> int | None:
    """The size of the device's own memory; None where it has none, or does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return None


@dataclass(frozen=True)
class Need:
    """What views of one size need on a device of `total` bytes."""

    weights: int
    view: int
    """Bytes per view: all of its rows."""
    total: int

    def bytes(self, views: int) -> int:
        """For `views` in one call."""
        return self.weights + views * self.view

    @property
    def fitting(self) -> int:
        """Views that go into one call, at least one."""
        return max(1, int((USABLE * self.total - self.weights) // self.view))

    def sentence(self, views: int, device: str, automatic: bool) -> str:
        """What `views` views mean on `device`, and what is done about it, for the user."""
        need = (
            f"{views} at a time need about {self.bytes(views) / 1e9:.0f} GB, and {device} has {self.total / 1e9:.0f} GB"
        )
        if views <= self.fitting:
            return need
        return f"{need}: {self.fitting} at a time" if automatic else f"{need}; set upscale.view_batch: {self.fitting}"


def need_of(models: Models, window: tuple[int, int], branches: int) -> Need | None:
    """For views of `window` (height, width) latents by `branches` guidance branches.

    None where the device has no memory of its own, or the base model does not know what a row takes.
    """
    total = device_bytes(models.device)
    row = None if total is None else models.base.row_bytes(*window)
    return None if total is None or row is None else Need(weights_bytes(models), branches * row, total)


def view_limit(models: Models, limit: int | None, window: tuple[int, int], branches: int) -> int:
    """Views per call of the denoiser at most.

    `limit` (`Diffusion.view_batch`), or where it is None what the device's memory allows.
    """
    if limit is not None:
        return limit
    need = need_of(models, window, branches)
    return CPU_VIEWS if need is None else need.fitting


def preflight(models: Models, limit: int | None, grid: Grid, branches: int) -> list[str]:
    """What an image of `grid`'s views will need of the device, and what slows it down without need: a line each, if
    `need_of` knows."""
    need = need_of(models, grid.window_size, branches)
    if need is None:
        return []
    name = torch.cuda.get_device_name(models.device) if models.device.type == "cuda" else models.device.type
    views = min(len(grid), limit or len(grid))
    lines = [f"{grid.height_px} x {grid.width_px} px in {len(grid)} views: {need.sentence(views, name, limit is None)}"]
    if models.base.vae.dtype == torch.float16 and models.base.vae.config.force_upcast:
        lines.append(
            "the VAE overflows in float16 and computes in float32, several times slower; set model.vae to one that is "
            "safe, such as madebyollin/sdxl-vae-fp16-fix for SDXL"
        )
    return lines
