"""How much a UNet has to evaluate for one picture, from the configuration alone: no model is loaded.

The numbers are those that `diffusion.cost` counts when the picture is made with `view_batch: 1` (greater batches may repeat
a view to keep one shape); a test holds the two together for every method. Method scalecrafter is counted as on SDXL, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from resmaster_stages.config.dataset import DatasetConfig, LowResConfig
from resmaster_stages.config.methods import UpscaleConfig
from resmaster_stages.diffusion.views import Grid, target_size, view_grid
from resmaster_stages.models.bases.base import Geometry


@dataclass(frozen=True)
class UnetWork:
    """Evaluations of one size."""

    rows: int
    """Views through the UNet, guidance branches counted."""
    area: float
    """Of each view, in units of the native area."""

    @property
    def native_rows(self) -> float:
        """`rows` in units of a native view."""
        return self.rows * self.area


def low_res_work(config: LowResConfig, geometry: Geometry, height: int, width: int) -> tuple[UnetWork, ...]:
    """What a generated low-res picture of `height` x `width` px takes."""
    return (UnetWork(config.steps * _branches(config.guidance_scale), height * width / geometry.native_px**2),)


def high_res_work(config: UpscaleConfig, geometry: Geometry, height: int, width: int) -> tuple[UnetWork, ...]:
    """What the upscaling of a low-res picture of `height` x `width` px takes; nothing where a method has no UNet."""
    work: list[UnetWork] = []
    before = 1.0
    for scale, own in zip((*config.via, config.scale), config.passes()):
        grid = view_grid(geometry, *target_size(height, width, scale), config.stride)
        low_height, low_width = target_size(height, width, before)
        low_area = low_height / geometry.native_px * (low_width / geometry.native_px)
        work += _of_method(own, grid, low_area)
        before = scale
    return tuple(work)


def stage_work(config: DatasetConfig, geometry: Geometry, height: int, width: int) -> dict[str, tuple[UnetWork, ...]]:
    """Stage -> what a sample with a low-res picture of `height` x `width` px takes; stages without a UNet are left out."""
    work = {"high_res": high_res_work(config.upscale, geometry, height, width)}
    if not config.images:
        work["low_res"] = low_res_work(config.low_res, geometry, height, width)
    return work


def _branches(guidance_scale: float) -> int:
    return 2 if guidance_scale > 1 else 1


def _branches_at(config: UpscaleConfig, index: int) -> int:
    """Guidance branches of step `index` of the path."""
    return _branches(config.guidance_scale) if index / config.steps < config.guidance_stop else 1


def _of_method(config: UpscaleConfig, grid: Grid, low_area: float) -> Iterator[UnetWork]:
    from resmaster_stages.diffusion.shifted_views import moving_grid
    from resmaster_stages.methods.passes import first_step, phase_scales

    steps = config.steps
    canvas = _area(grid.height, grid.width, grid)
    view = _area(grid.window_height, grid.window_width, grid)
    single = range(first_step(config.start, steps), steps)

    def rows(indices: Iterable[int]) -> int:
        """Of one view in these steps."""
        return sum(_branches_at(config, index) for index in indices)

    if config.method in ("resmaster", "multidiffusion"):
        moving = moving_grid(grid, config)
        moved = [index for index in single if moving is not None and index / steps < config.shift_stop]
        yield UnetWork(rows(set(single) - set(moved)) * len(grid), view)
        if moving is not None:
            yield UnetWork(rows(moved) * len(moving), view)
    elif config.method == "c_upscale":
        left = range(first_step(config.c_upscale.start, steps), steps)
        yield UnetWork(rows(left) * len(grid), view)
        if config.c_upscale.share:
            yield UnetWork(len(left), low_area)
    elif config.method == "demofusion":
        left = range(first_step(config.demofusion.start, steps), steps)
        for scale in phase_scales(config.scale, config.demofusion.phases, config.demofusion.refine):
            height, width = _phase(grid, scale, config.scale)
            phase, factor = Grid(height, width, grid.window, grid.stride), max(1, round(scale))
            yield UnetWork(rows(left) * len(phase), _area(phase.window_height, phase.window_width, grid))
            yield UnetWork(rows(left) * factor**2, _area(-(-height // factor), -(-width // factor), grid))
    elif config.method == "freescale":
        left = range(first_step(config.freescale.start, steps), steps)
        for scale in phase_scales(config.scale, config.freescale.phases, refine=False):
            yield UnetWork(rows(left), _area(*_phase(grid, scale, config.scale), grid))
    elif config.uses_diffusion():
        third = _steps_with_a_third_branch(config, grid) if config.guidance_scale > 1 else 0
        yield UnetWork(rows(single) + max(0, third - single.start), canvas)


def _area(height: int, width: int, grid: Grid) -> float:
    """Of `height` x `width` latents, in units of the native area."""
    return height * width / grid.window**2


def _phase(grid: Grid, scale: float, last: float) -> tuple[int, int]:
    """Rows and columns of the canvas of a phase, in latents."""
    return max(1, round(grid.height * scale / last)), max(1, round(grid.width * scale / last))


def _steps_with_a_third_branch(config: UpscaleConfig, grid: Grid) -> int:
    """Steps at which ScaleCrafter and FouriScale evaluate a third branch; none for direct inference."""
    native = grid.window * grid.unit_px
    height, width = grid.height_px or grid.height * grid.unit_px, grid.width_px or grid.width * grid.unit_px
    if config.method == "scalecrafter":
        from resmaster_stages.methods import scalecrafter

        return scalecrafter.make_plan(height / native, width / native, config.steps, config.scalecrafter).damped_until
    if config.method == "fouriscale":
        from resmaster_stages.methods import fouriscale

        plan = fouriscale.make_plan(height, width, native, config.steps, config.fouriscale)
        return plan.until if plan.factor > 1 else 0
    return 0
