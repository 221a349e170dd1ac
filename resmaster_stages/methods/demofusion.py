"""DemoFusion (Du et al., CVPR 2024): the picture grows phase by phase; every phase is denoised as a whole path.

Each phase enlarges the latents of the one before, and follows them in three ways:
- skip residual: every noisy latent is pulled to the enlarged latents, noised by one and the same draw;
- local views: overlapping windows, shifted at random at every step;
- dilated views: interleaved samples of the blurred canvas, which see the picture whole.
All three fade with (1 + cos(pi (T - t) / T)) / 2, raised to `cosine_scale_1`, `_3` and `_2`.

Authors' word: all of the above, and preset `faithful` (their published settings; windows that reach beyond the canvas see
zeros, and crop coordinates count from that padded border). Our choice: windows stay inside the canvas and tell their true
place; the first tenth of each phase, which mostly copies the noised reference, is left out; any scale, not only whole ones.
Different from the authors in both presets: the first phase is the project's low-res picture, encoded, and was told its own
size rather than the target's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.config.methods import DemoFusionConfig
from resmaster_stages.diffusion.conditions import Conditions, make_conditions
from resmaster_stages.diffusion.frequency import gaussian_blur
from resmaster_stages.diffusion.irregular_views import (
    InterleavedViews,
    Origins,
    ScatteredViews,
    clamped,
    jitter_reach,
    jittered,
)
from resmaster_stages.diffusion.loop import CanvasNoise, Composition, LatentHook, ViewGroup, Views, always
from resmaster_stages.diffusion.reference_guidance import match_moments, skip_residual
from resmaster_stages.diffusion.steppers import make_stepper
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.passes import Stage, first_step, phase_scales
from resmaster_stages.methods.request import Request
from resmaster_stages.models.schedule import Step


def dilated_input(factor: int, settings: DemoFusionConfig) -> LatentHook:
    """What dilated views are cut from: the canvas, blurred less and less, at its own mean and standard deviation."""

    def blur(z: Tensor, step: Step) -> Tensor:
        if factor == 1:
            return z
        sigma = settings.sigma * (0.99 * step.cosine**settings.cosine_scale_3 + 0.01)
        return match_moments(gaussian_blur(z, factor - 1, sigma), z)

    return blur


def _conditions(request: Request, grid: Grid, origins: list[Origins]) -> Conditions:
    """Of windows at `origins`, per sample. Size and target are those of the final picture in every phase."""
    factor, (height, width) = request.models.geometry.latent_factor, request.canvas_size
    canvas, window = (height * factor, width * factor), (grid.window_height * factor, grid.window_width * factor)
    native = request.config.micro_conditioning == "native"
    places = [origin for each in origins for origin in each]
    sizes = [(*window, 0, 0, *window) if native else (*canvas, y * factor, x * factor, *canvas) for y, x in places]
    views = len(origins[0])
    return make_conditions(
        request.models,
        grid,
        [text for text in request.prompts for _ in range(views)],
        [text for text in request.negative_prompts for _ in range(views)],
        guided=request.guided,
        sizes=sizes,
    )


def _local_views(request: Request, grid: Grid, noise: CanvasNoise) -> ViewGroup:
    """Windows at new places at every step; each sample's places come from its own generator."""
    config, device = request.config, request.models.device
    zeros = config.demofusion.jitter == "zeros"
    border = jitter_reach(grid) if zeros else 0
    regular = [[(y, x) for y in grid.rows for x in grid.cols]] * len(request.prompts)
    conditions = _conditions(request, grid, regular)
    factor = request.models.geometry.latent_factor

    def at(step: Step) -> tuple[Views, Conditions]:
        if config.demofusion.jitter == "off":
            origins = regular
        else:
            origins = [jittered(grid, generator) for generator in noise.generators]
        if not zeros:
            origins = [clamped(grid, each) for each in origins]
        views = ScatteredViews(grid, origins, config.fuse, device)
        if config.micro_conditioning == "native":
            return views, conditions
        crops = [((y + border) * factor, (x + border) * factor) for each in origins for y, x in each]
        sizes = conditions.sizes.clone()
        sizes[:, 2:4] = torch.tensor(crops, dtype=sizes.dtype).to(device, non_blocking=True)
        return views, replace(conditions, sizes=sizes)

    return ViewGroup(
        at,
        request.guidance(),
        weight=lambda step: 1 - step.cosine**config.demofusion.cosine_scale_2,
    )


def _dilated_views(request: Request, height: int, width: int, factor: int) -> ViewGroup:
    """Interleaved samples of the whole canvas, which all count as crops at its corner."""
    config = request.config
    views = InterleavedViews(height, width, factor)
    size = max(-(-height // factor), -(-width // factor))
    grid = Grid(-(-height // factor), -(-width // factor), size, size)
    conditions = _conditions(request, grid, [[(0, 0)] * len(views)] * len(request.prompts))
    return ViewGroup(
        always(views, conditions),
        request.guidance(),
        weight=lambda step: step.cosine**config.demofusion.cosine_scale_2,
        prepare=dilated_input(factor, config.demofusion),
    )


def stages(request: Request) -> tuple[Stage, ...]:
    """One stage per phase, each enlarged from the one before, all held to the low-res latents' mean and deviation."""
    config, settings = request.config, request.config.demofusion
    reference = request.required_reference()
    height, width = request.canvas_size
    first = first_step(settings.start, config.steps)

    def phase(scale: float) -> Stage:
        rows, cols = (max(1, round(side * scale / config.scale)) for side in (height, width))
        window = request.views()

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            small = reference.small_latents if previous is None else previous
            x0 = F.interpolate(small, size=(rows, cols), mode="bicubic", align_corners=False)
            draw = noise()
            grid = Grid(rows, cols, window.window, window.stride)
            return step.noised(x0, draw), Composition(
                groups=(
                    _local_views(request, grid, noise),
                    _dilated_views(request, rows, cols, max(1, round(scale))),
                ),
                stepper=make_stepper(config.stepper),
                latent_hooks=(skip_residual(x0, draw, settings.cosine_scale_1),),
            )

        return Stage(rows, cols, begin, first, lambda z: match_moments(z, reference.small_latents))

    return tuple(phase(scale) for scale in phase_scales(config.scale, settings.phases, settings.refine))
