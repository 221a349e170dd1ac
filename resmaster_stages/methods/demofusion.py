"""DemoFusion (Du et al., CVPR 2024): the image grows phase by phase, and every phase is denoised over a whole path.

Each phase enlarges the latents of the phase before and follows them in three ways:
- skip residual: every noisy latent is pulled to the enlarged latents, which are always noised by the same draw;
- local views: overlapping windows, shifted at random at every step;
- dilated views: interleaved samples of the blurred canvas, so that each shows the whole image.
With c = (1 + cos(pi (T - t) / T)) / 2, the skip residual fades with c^`cosine_scale_1`, the weight of the dilated views
with c^`cosine_scale_2`, and the blur with c^`cosine_scale_3`.

Two later papers changed parts of it, which are settings here. AccDiffusion (Lin et al., ECCV 2024) shuffles the dilated
views before they are predicted and gives each local view words of its own (`shuffle`, `text_prompt`, preset
`accdiffusion`). FAM Diffusion (Yang et al., CVPR 2025) follows the enlarged latents in low frequencies alone (`skip:
low`).

From the authors: all of the above, and preset `faithful` (their published settings; windows that reach beyond the
canvas see zeros, and crop coordinates count from that padded border). Our choice in preset `default`: windows stay
inside the canvas, and their crop coordinates are their true places; the first tenth of each phase, which mostly copies
the noised reference, is left out. Any scale is possible, not only whole numbers. Different from the authors in both
presets: the first phase is the project's low-res image, encoded, and was generated with its own size as size condition
instead of the target's. Different from the authors of AccDiffusion in preset `accdiffusion`: captions are those of the
dataset, local views move at every step instead of once per phase, and all dilated views of an image are shuffled
together, however many are in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import Source, register
from resmaster_stages.config.part import Later
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid, interleaved_size
from resmaster_stages.methods.passes import Pass, phase_scales, phase_sizes
from resmaster_stages.methods.settings import Following, TextPromptConfig, Views, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.conditions import Conditions
    from resmaster_stages.diffusion.irregular_views import Origins
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, LatentHook, ViewGroup
    from resmaster_stages.diffusion.loop import Views as CutViews
    from resmaster_stages.methods.passes import Begin
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.schedule import Course, Step


PUBLISHED: dict[str, Any] = {"stepper": "ddim_keep", "start": 0.0, "jitter": "zeros"}


@register
class DemoFusion(Views, Following):
    """The image grows phase by phase: much new detail, but slow."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "faithful": PUBLISHED,
        "accdiffusion": {**PUBLISHED, "shuffle": "channels", "text_prompt": {"enabled": True}},
    }
    reads: ClassVar[tuple[Source, ...]] = ("reference", "captions")
    own_way: ClassVar[Literal["image", "latent"]] = "latent"

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
    skip: Literal["all", "low"] = Later("all")
    """What the skip residual pulls. `all`: whole latents, less and less. `low`: their low frequencies, more and more of
    them (FAM Diffusion). Then `cosine_scale_1` is not read."""
    shuffle: Literal["none", "channels", "positions"] = Later("none")
    """At every step, dilated views exchange their latents at random before they are predicted, and take their own
    predictions back (AccDiffusion). `channels`: at each position and channel anew (the authors' code). `positions`: at
    each position, all channels together (their paper). `none`: they do not."""
    text_prompt: TextPromptConfig = Later(TextPromptConfig(enabled=False))
    """Each local view's own caption. Off by default here: every view gets the global prompt."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and (what != "captions" or self.text_prompt.enabled)

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
        from resmaster_stages.diffusion.loop import Composition
        from resmaster_stages.diffusion.reference_guidance import low_residual, skip_residual
        from resmaster_stages.diffusion.steppers import make_stepper

        window = request.views()

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            draw = noise()
            x0 = request.roughened(request.latents_before(previous, rows, cols), noise)
            grid = Grid(rows, cols, window.window, window.stride)
            low = self.skip == "low"
            return step.noised(x0, draw), Composition(
                groups=(
                    _local_views(request, self, grid, noise),
                    _dilated_views(request, self, (rows, cols, max(1, round(scale))), noise),
                ),
                stepper=make_stepper(self.stepper),
                latent_hooks=(low_residual(x0, draw) if low else skip_residual(x0, draw, self.cosine_scale_1),),
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


def _conditions(
    request: Request, settings: DemoFusion, grid: Grid, origins: list[Origins], texts: list[str] | None = None
) -> Conditions:
    """Conditions of the windows at each sample's `origins`. In every phase, the sizes are those of the final image.

    texts: one per window, sample by sample. None: the prompts.
    """
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
        texts or [text for text in request.prompts for _ in range(views)],
        [text for text in request.negative_prompts for _ in range(views)],
        guidance_scale=request.config.guidance_scale,
        sizes=sizes,
    )


def nearest_captions(grid: Grid, origins: list[Origins], captioned: Grid) -> list[int]:
    """For each window of `grid` at each sample's `origins`, the item (sample * views + view) of the view of `captioned`
    whose centre is nearest, in parts of the image. The two grids may have canvases of different sizes."""

    def centres(starts: Iterable[int], side: int, length: int) -> list[float]:
        return [(start + side / 2) / length for start in starts]

    def nearest(places: list[float], among: list[float]) -> list[int]:
        return [min(range(len(among)), key=lambda i: abs(among[i] - place)) for place in places]

    rows = centres(captioned.rows, captioned.window_height, captioned.height)
    cols = centres(captioned.cols, captioned.window_width, captioned.width)
    items = []
    for sample, each in enumerate(origins):
        y, x = (list(axis) for axis in zip(*each))
        down = nearest(centres(y, grid.window_height, grid.height), rows)
        across = nearest(centres(x, grid.window_width, grid.width), cols)
        items += [sample * len(captioned) + row * len(cols) + col for row, col in zip(down, across)]
    return items


def _local_views(request: Request, settings: DemoFusion, grid: Grid, noise: CanvasNoise) -> ViewGroup:
    """Windows at new places at every step. Each sample's places are drawn from its own generator."""
    import torch

    from resmaster_stages.diffusion.irregular_views import ScatteredViews, clamped, jitter_reach, jittered
    from resmaster_stages.diffusion.loop import ViewGroup

    device, zeros, samples = request.models.device, settings.jitter == "zeros", len(request.prompts)
    border = jitter_reach(grid) if zeros else 0
    regular = [[(y, x) for y in grid.rows for x in grid.cols]] * samples
    captioned = request.views() if settings.text_prompt.enabled and request.captions is not None else None
    if captioned is None:
        conditions = _conditions(request, settings, grid, regular)
    else:
        corners = [[box[:2] for box in captioned.boxes]] * samples
        conditions = _conditions(request, settings, captioned, corners, request.view_texts(captioned))
    factor = request.models.geometry.latent_factor

    def at(step: Step) -> tuple[CutViews, Conditions]:
        if settings.jitter == "off":
            origins = regular
        else:
            origins = [jittered(grid, generator) for generator in noise.generators]
        if not zeros:
            origins = [clamped(grid, each) for each in origins]
        views, own = ScatteredViews(grid, origins, settings.fuse, device), conditions
        if captioned is not None:
            own = conditions.take(torch.tensor(nearest_captions(grid, origins, captioned)))
        if settings.micro_conditioning == "native":
            return views, own
        crops = [((y + border) * factor, (x + border) * factor) for each in origins for y, x in each]
        sizes = own.sizes.clone()
        sizes[:, 2:4] = torch.tensor(crops, dtype=sizes.dtype).to(device, non_blocking=True)
        return views, replace(own, sizes=sizes)

    return ViewGroup(
        at,
        settings.guidance(request.models),
        weight=lambda step: 1 - step.cosine**settings.cosine_scale_2,
    )


def _dilated_views(
    request: Request, settings: DemoFusion, canvas: tuple[int, int, int], noise: CanvasNoise
) -> ViewGroup:
    """Interleaved samples of the whole canvas (height, width, samples per axis). All have the crop coordinates of the
    canvas's corner."""
    import torch

    from resmaster_stages.diffusion.irregular_views import InterleavedViews, Shuffled, shuffle_order
    from resmaster_stages.diffusion.loop import ViewGroup

    (height, width, factor), multiple = canvas, request.models.geometry.multiple
    views = InterleavedViews(height, width, factor, multiple)
    size = interleaved_size(height, width, factor, multiple)
    grid = Grid(*size, max(size), max(size))
    conditions = _conditions(request, settings, grid, [[(0, 0)] * len(views)] * len(request.prompts))
    channels, device = noise.shape[1] if settings.shuffle == "channels" else 1, request.models.device

    def at(step: Step) -> tuple[CutViews, Conditions]:
        if settings.shuffle == "none" or factor == 1:
            return views, conditions
        orders = [shuffle_order(len(views), (channels, *size), generator, device) for generator in noise.generators]
        return Shuffled(views, torch.stack(orders)), conditions

    return ViewGroup(
        at,
        settings.guidance(request.models),
        weight=lambda step: step.cosine**settings.cosine_scale_2,
        prepare=dilated_input(factor, settings),
    )
