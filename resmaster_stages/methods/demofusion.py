"""DemoFusion (Du et al., CVPR 2024): the image grows phase by phase, and every phase is denoised over a whole path.

Each phase enlarges the latents of the phase before and follows them in three ways:
- skip residual: every noisy latent is pulled to the enlarged latents, which are always noised by the same draw;
- local views: overlapping windows, shifted at random at every step;
- dilated views: interleaved samples of the blurred canvas, so that each shows the whole image.
With c = (1 + cos(pi (T - t) / T)) / 2, the skip residual fades with c^`cosine_scale_1`, the weight of the dilated views
with c^`cosine_scale_2`, and the blur with c^`cosine_scale_3`.

From the authors: all of the above, and preset `faithful` (their published settings; windows that reach beyond the
canvas see zeros, and crop coordinates count from that padded border). Our choice in preset `default`: windows stay
inside the canvas, and their crop coordinates are their true places; the first tenth of each phase, which mostly copies
the noised reference, is left out. Any scale is possible, not only whole numbers. Different from the authors in both
presets: the first phase is the project's low-res image, encoded, and was generated with its own size as size condition
instead of the target's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import Source, register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid, interleaved_size
from resmaster_stages.methods.passes import Pass, phase_scales, phase_sizes
from resmaster_stages.methods.settings import Views, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.conditions import Conditions
    from resmaster_stages.diffusion.irregular_views import Origins
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, LatentHook, ViewGroup
    from resmaster_stages.diffusion.loop import Views as CutViews
    from resmaster_stages.methods.passes import Begin
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.schedule import Course, Step


@register
class DemoFusion(Views):
    """The image grows phase by phase: much new detail, but slow."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "faithful": {"stepper": "ddim_keep", "start": 0.0, "jitter": "zeros"},
    }
    reads: ClassVar[tuple[Source, ...]] = ("reference",)

    method: Literal["demofusion"] = "demofusion"
    phases: Literal["every", "doubling", "last"] = "every"
    """Sizes on the way to the target. `every`: 2, 3, 4, ... times the low-res size (the paper). `doubling`: 2, 4, ...
    `last`: the target at once."""
    refine: bool = False
    """Add a first phase at the low-res size, as the authors' code does for a user's own image."""
    start: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of each phase's steps that is left out at the noisy end. The authors leave out none."""
    cosine_scale_1: float = Field(default=3.0, ge=0)
    """Decay of the skip residual. With a greater value, a phase departs sooner from the phase before."""
    cosine_scale_2: float = Field(default=1.0, ge=0)
    """Decay of the dilated views' share of the prediction."""
    cosine_scale_3: float = Field(default=1.0, ge=0)
    """Decay of the blur that is applied before dilated views are cut."""
    sigma: float = Field(default=0.8, gt=0)
    """Standard deviation of this blur at the start, in latents."""
    jitter: Literal["clamped", "zeros", "off"] = "clamped"
    """Random shifts of local views. `clamped`: inside the canvas. `zeros`: also beyond its border, where views see
    zeros (the authors). `off`: no shifts."""

    def canvases(self, grid: Grid) -> tuple[tuple[float, int, int], ...]:
        """(scale, rows, columns) of each phase on the way to the canvas of `grid`."""
        scales = phase_scales(self.scale, self.phases, self.refine)
        return phase_sizes(grid.height, grid.width, scales, grid.multiple)

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The local and the dilated views of every phase."""
        left, share = self.left(self.start, course), [each**self.cosine_scale_2 for each in course.decay]
        local = [index for index in left if not share or share[index] < 1]
        dilated = self.rows((index for index in left if not share or share[index] > 0), course)
        for scale, height, width in self.canvases(grid):
            phase, factor = Grid(height, width, grid.window, grid.stride), max(1, round(scale))
            yield from self.views_work(local, len(phase), area(*phase.window_size, grid), course)
            yield UnetWork(dilated * factor**2, area(*interleaved_size(height, width, factor, grid.multiple), grid))

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass per phase. The result of each pass is brought to the mean and standard deviation of the low-res
        latents."""
        from resmaster_stages.diffusion.reference_guidance import match_moments

        first, reference = request.course.first(self.start), request.required_reference()
        return tuple(
            Pass(
                rows,
                cols,
                self.beginning(request, scale, rows, cols),
                first,
                lambda z: match_moments(z, reference.small_latents),
            )
            for scale, rows, cols in self.canvases(request.views())
        )

    def beginning(self, request: Request, scale: float, rows: int, cols: int) -> Begin:
        """The start of the phase of `rows` x `cols` latents: the latents of the phase before, enlarged and noised."""
        import torch.nn.functional as F

        from resmaster_stages.diffusion.loop import Composition
        from resmaster_stages.diffusion.reference_guidance import skip_residual
        from resmaster_stages.diffusion.steppers import make_stepper

        reference, window = request.required_reference(), request.views()

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            small = reference.small_latents if previous is None else previous
            x0 = F.interpolate(small, size=(rows, cols), mode="bicubic", align_corners=False)
            draw = noise()
            grid = Grid(rows, cols, window.window, window.stride)
            return step.noised(x0, draw), Composition(
                groups=(
                    _local_views(request, self, grid, noise),
                    _dilated_views(request, self, rows, cols, max(1, round(scale))),
                ),
                stepper=make_stepper(self.stepper),
                latent_hooks=(skip_residual(x0, draw, self.cosine_scale_1),),
            )

        return begin


def dilated_input(factor: int, settings: DemoFusion) -> LatentHook:
    """The canvas that dilated views are cut from: blurred less and less, with its mean and standard deviation kept."""
    from resmaster_stages.diffusion.frequency import gaussian_blur
    from resmaster_stages.diffusion.reference_guidance import match_moments

    def blur(z: Tensor, step: Step) -> Tensor:
        if factor == 1:
            return z
        sigma = settings.sigma * (0.99 * step.cosine**settings.cosine_scale_3 + 0.01)
        return match_moments(gaussian_blur(z, factor - 1, sigma), z)

    return blur


def _conditions(request: Request, settings: DemoFusion, grid: Grid, origins: list[Origins]) -> Conditions:
    """Conditions of the windows at each sample's `origins`. In every phase, the sizes are those of the final image."""
    from resmaster_stages.diffusion.conditions import make_conditions

    factor, (height, width) = request.models.geometry.latent_factor, request.canvas_size
    canvas, window = (height * factor, width * factor), (grid.window_height * factor, grid.window_width * factor)
    native = settings.micro_conditioning == "native"
    places = [origin for each in origins for origin in each]
    sizes = [(*window, 0, 0, *window) if native else (*canvas, y * factor, x * factor, *canvas) for y, x in places]
    views = len(origins[0])
    return make_conditions(
        request.models,
        grid,
        [text for text in request.prompts for _ in range(views)],
        [text for text in request.negative_prompts for _ in range(views)],
        guidance_scale=request.config.guidance_scale,
        sizes=sizes,
    )


def _local_views(request: Request, settings: DemoFusion, grid: Grid, noise: CanvasNoise) -> ViewGroup:
    """Windows at new places at every step. Each sample's places are drawn from its own generator."""
    import torch

    from resmaster_stages.diffusion.irregular_views import ScatteredViews, clamped, jitter_reach, jittered
    from resmaster_stages.diffusion.loop import ViewGroup

    device, zeros = request.models.device, settings.jitter == "zeros"
    border = jitter_reach(grid) if zeros else 0
    regular = [[(y, x) for y in grid.rows for x in grid.cols]] * len(request.prompts)
    conditions = _conditions(request, settings, grid, regular)
    factor = request.models.geometry.latent_factor

    def at(step: Step) -> tuple[CutViews, Conditions]:
        if settings.jitter == "off":
            origins = regular
        else:
            origins = [jittered(grid, generator) for generator in noise.generators]
        if not zeros:
            origins = [clamped(grid, each) for each in origins]
        views = ScatteredViews(grid, origins, settings.fuse, device)
        if settings.micro_conditioning == "native":
            return views, conditions
        crops = [((y + border) * factor, (x + border) * factor) for each in origins for y, x in each]
        sizes = conditions.sizes.clone()
        sizes[:, 2:4] = torch.tensor(crops, dtype=sizes.dtype).to(device, non_blocking=True)
        return views, replace(conditions, sizes=sizes)

    return ViewGroup(
        at,
        settings.guidance(request.models),
        weight=lambda step: 1 - step.cosine**settings.cosine_scale_2,
    )


def _dilated_views(request: Request, settings: DemoFusion, height: int, width: int, factor: int) -> ViewGroup:
    """Interleaved samples of the whole canvas. All have the crop coordinates of the canvas's corner."""
    from resmaster_stages.diffusion.irregular_views import InterleavedViews
    from resmaster_stages.diffusion.loop import ViewGroup, always

    multiple = request.models.geometry.multiple
    views = InterleavedViews(height, width, factor, multiple)
    size = interleaved_size(height, width, factor, multiple)
    grid = Grid(*size, max(size), max(size))
    conditions = _conditions(request, settings, grid, [[(0, 0)] * len(views)] * len(request.prompts))
    return ViewGroup(
        always(views, conditions),
        settings.guidance(request.models),
        weight=lambda step: step.cosine**settings.cosine_scale_2,
        prepare=dilated_input(factor, settings),
    )
