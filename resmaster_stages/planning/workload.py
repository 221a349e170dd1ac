"""Computes from the configuration alone how much a UNet has to evaluate for one image. Loads no model.

The numbers equal those that `diffusion.cost` counts when the image is made with `view_batch: 1`. (Greater batches may
repeat a view to keep one shape.) A test compares the two for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig
from resmaster_stages.config.method import Method
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import native_size, target_size, view_grid
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.bases import family_of
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.schedule import Course, Timing, even_course


@dataclass(frozen=True)
class Denoising:
    """What a base model adds to a forecast."""

    geometry: Geometry
    guided: bool = True
    """Whether a guidance scale other than 1 takes an unconditional branch."""
    course: Callable[[int, Timing], Course] = lambda steps, timing: even_course(steps)
    """(steps, timing) -> the course of the path."""


def denoising_of(config: ModelConfig) -> Denoising:
    """What the model that `config` names adds. Raises ConfigError."""
    family = family_of(config)
    guided = family.sampling(config).kind == "cfg"
    return Denoising(family.geometry(config), guided, partial(family.course, config))


def low_res_work(config: LowResConfig, base: Denoising, height: int, width: int) -> tuple[UnetWork, ...]:
    """The UNet work of a generated low-res image of `height` x `width` px."""
    branches = 2 if base.guided and config.guidance_scale > 1 else 1
    return (UnetWork(config.steps * branches, height * width / base.geometry.native_px**2),)


def high_res_work(config: Method, base: Denoising, height: int, width: int) -> tuple[UnetWork, ...]:
    """The UNet work to upscale a low-res image of `height` x `width` px. Empty for methods without a UNet."""
    work: list[UnetWork] = []
    if isinstance(config, Diffusion):
        for scale, own in zip((*config.via, config.scale), config.way()):
            grid = view_grid(base.geometry, *target_size(height, width, scale), own.view_stride, own.wraps)
            course = base.course(own.steps, own.timing(grid))
            work += own.work(grid, replace(course, guided=base.guided))
    return tuple(work)


def captions_work(config: DatasetConfig, base: Denoising, height: int, width: int) -> tuple[UnetWork, ...]:
    """The UNet work to choose the words of an image of `height` x `width` px. Empty if a captioner writes captions."""
    if config.captions.source != "attention" or not config.upscale.uses("captions"):
        return ()
    rows, cols = native_size(base.geometry, height, width)
    return (UnetWork(config.captions.noise_levels, rows * cols / base.geometry.native_px**2),)


def stage_work(config: DatasetConfig, height: int, width: int) -> dict[str, tuple[UnetWork, ...]]:
    """Stage -> UNet work of a sample with a low-res image of `height` x `width` px. Stages without a UNet are absent,
    or empty. Raises ConfigError."""
    base, method = denoising_of(config.model.base), config.upscale
    between = method.via if isinstance(method, Diffusion) else ()
    again = [captions_work(config, base, *target_size(height, width, scale)) for scale in between]
    work = {
        "captions": captions_work(config, base, height, width),
        "high_res": (
            *high_res_work(method, denoising_of(config.model), height, width),
            *(each for some in again for each in some),
        ),
    }
    if not config.images:
        work["low_res"] = low_res_work(config.low_res, base, height, width)
    return work
