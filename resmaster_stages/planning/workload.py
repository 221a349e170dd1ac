"""Computes from the configuration alone how much a UNet has to evaluate for one image. Loads no model.

The numbers equal those that `diffusion.cost` counts when the image is made with `view_batch: 1`. (Greater batches may
repeat a view to keep one shape.) A test compares the two for every method.
"""

from __future__ import annotations

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig
from resmaster_stages.config.method import Method
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import target_size, view_grid
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.bases.base import Geometry


def low_res_work(config: LowResConfig, geometry: Geometry, height: int, width: int) -> tuple[UnetWork, ...]:
    """The UNet work of a generated low-res image of `height` x `width` px."""
    branches = 2 if config.guidance_scale > 1 else 1
    return (UnetWork(config.steps * branches, height * width / geometry.native_px**2),)


def high_res_work(config: Method, geometry: Geometry, height: int, width: int) -> tuple[UnetWork, ...]:
    """The UNet work to upscale a low-res image of `height` x `width` px. Empty for methods without a UNet."""
    work: list[UnetWork] = []
    if isinstance(config, Diffusion):
        for scale, own in zip((*config.via, config.scale), config.way()):
            work += own.work(view_grid(geometry, *target_size(height, width, scale), own.view_stride))
    return tuple(work)


def stage_work(config: DatasetConfig, geometry: Geometry, height: int, width: int) -> dict[str, tuple[UnetWork, ...]]:
    """Stage -> UNet work of a sample with a low-res image of `height` x `width` px. Stages without a UNet are absent,
    or empty."""
    work = {"high_res": high_res_work(config.upscale, geometry, height, width)}
    if not config.images:
        work["low_res"] = low_res_work(config.low_res, geometry, height, width)
    return work
