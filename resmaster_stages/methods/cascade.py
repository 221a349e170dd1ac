"""Cascades: the image is drawn on canvases that grow, with one path, or a part of one, on each.

Every later canvas begins with the image of the one before. This is decoded (where the path was left in the middle, it
is the x0 that the last step predicts), enlarged in pixels, encoded and noised. The presets are the settings of four
papers, and differ in where one canvas is left, where the next one begins, and in guidance:

- `rectifiedhr` (RectifiedHR, 2025): one path, which goes on at the next size; guidance rises from size to size;
- `frecas` (FreCaS, ICLR 2025): timesteps of its own for each size, which begins with more noise than the one before
  ended with, so that detail that the smaller image cannot hold is drawn anew; guidance by band;
- `diffusehigh` (DiffuseHigh, AAAI 2025): each size is finished; the next one begins at 30 % of the noise, from the
  sharpened image, and its first steps take their low frequencies from this image (a wavelet's low band, in pixels);
- `megafusion` (MegaFusion, WACV 2025): one path, which goes on at the next size.

From the authors: the sizes at 2x and 4x, the steps and guidance of each, where noise is added, the enlargement, the
bands and the swap. Our choice: preset `default`, whose first size is not drawn, because the low-res image stands for
it; every scale that the authors do not name (settings between those for 2x and 4x, further sizes by the same rule);
`swap: latents`. Different from the authors in all presets: images are encoded to the mode of the VAE's distribution
(MegaFusion and FreCaS: a sample), enlarged by torch instead of PIL, and clamped; each sample draws its own blur for
`sharpen`; a step that hands over goes to x0 by one formula. Left out: FreCaS's reuse of attention maps, MegaFusion's
other noise schedule and dilated middle block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from resmaster_stages.config.method import Source, register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.passes import Pass, phase_scales, phase_sizes
from resmaster_stages.methods.settings import GuidedByBand, MicroConditioned, area, timing_of
from resmaster_stages.models.schedule import Course, Timing, flow_level, noisier

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.frequency import LowPass
    from resmaster_stages.diffusion.guidance import ClassifierFree
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, Patch, X0Hook
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.parts import Models
    from resmaster_stages.models.schedule import Step

LARGE = 2.5
"""How many times the native size a canvas is whose attention is limited, if nothing else is said."""

Share = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=1)]
Exponent = Annotated[float, Field(ge=0, le=10)]
"""Settings that may be given as a pair: the values at 2x (and below) and at 4x (and above)."""


def at_scale(value: float | tuple[float, float], scale: float) -> float:
    """A setting at a target scale. Between 2x and 4x, it lies in proportion between the values of the pair."""
    if not isinstance(value, tuple):
        return value
    low, high = value
    return round(low + (high - low) * min(max((scale - 2) / 2, 0.0), 1.0), 9)


def between(low: float, high: float, place: float, exponent: float) -> float:
    """RectifiedHR's rule from `low` at place 0 to `high` at place 1. With exponent 0, it is `high` beyond place 0."""
    return round(low + (high - low) * place**exponent, 9) if place else low


AUTHORS: dict[str, Any] = {"first": "noise", "neighbourhood": False}
"""What the authors of all presets do."""


@dataclass(frozen=True)
class Phase:
    """One canvas of the cascade."""

    scale: float
    """Size relative to the low-res image."""
    begins: float
    """Fraction of the path that lies before the first step."""
    ends: float
    """Fraction of the path that lies before the hand-over. 1: the image is finished."""
    guidance: float


@register
class Cascade(GuidedByBand, MicroConditioned):
    """Whole canvases that grow along one path: few evaluations, for images up to about 4x."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "rectifiedhr": {
            **AUTHORS,
            "leave": (0.6, 0.8),
            "exponent": 0.5,
            "restart": None,
            "guidance_scale": 5.0,
            "guidance_last": (30.0, 50.0),
            "guidance_exponent": 0.5,
        },
        "frecas": {
            **AUTHORS,
            "phases": "doubling",
            "leave": (0.8, 0.6),
            "exponent": 1.0,
            "restart": None,
            "gamma": (1.5, 2.0),
            "middle": 0.1,
            "guidance_last": 35.0,
            "guidance_exponent": 0.0,
            "guidance_low": 7.5,
            "bands": "sizes",
            "enlarge": "nearest",
            "micro_conditioning": "native",
        },
        "diffusehigh": {
            **AUTHORS,
            "phases": "every",
            "leave": 1.0,
            "restart": 0.7,
            "guidance_scale": 5.0,
            "guidance_last": 10.0,
            "guidance_exponent": 0.0,
            "sharpen": 1.0,
            "swap": "pixels",
            "micro_conditioning": "native",
        },
        "megafusion": {
            **AUTHORS,
            "phases": "doubling",
            "leave": 0.8,
            "exponent": 1.0,
            "restart": None,
            "guidance_scale": 7.0,
        },
    }
    reads: ClassVar[tuple[Source, ...]] = ("reference",)
    in_one_piece: ClassVar[bool] = True

    method: Literal["cascade"] = "cascade"
    first: Literal["low_res", "noise"] = "low_res"
    """Where the first image comes from. `low_res`: the low-res image stands for the first size, which is then not
    drawn. `noise`: the first size is drawn anew from the prompt (the authors), and the low-res image is not read."""
    phases: Literal["halfway", "doubling", "every", "last"] = "halfway"
    """Sizes on the way from the low-res size to the target. `halfway`: one in the middle, from 2.5x on (RectifiedHR).
    `doubling`: 2, 4, ... times the low-res size. `every`: 2, 3, 4, ... `last`: none."""
    leave: Share | tuple[Share, Share] = 1.0
    """Fraction of the path after which the first size is left. Later sizes are left between there and the end. 1:
    every size is finished. A pair: at 2x and at 4x."""
    exponent: Exponent = 1.0
    """How the places where sizes are left rise to the end: 1 evenly, 0.5 quickly at first."""
    restart: float | None = Field(default=0.7, ge=0, lt=1)
    """Fraction of the path that each later size leaves out at the noisy end. A higher value keeps the result closer to
    the image before. null: it goes on where the size before was left, or with more noise (`gamma`)."""
    gamma: Annotated[float, Field(ge=0, le=10)] | tuple[Exponent, Exponent] = 0.0
    """With `restart: null`: how much more noise a size begins with. The signal-to-noise ratio falls by the ratio of the
    sizes to this power. 0: no more noise. A pair: at 2x and at 4x."""
    middle: float | None = Field(default=None, gt=0, le=1)
    """Share of the steps that each size between the first and the last takes. null: as many as lie on its part of the
    path."""
    guidance_last: Scale | tuple[Scale, Scale] | None = None
    """Guidance scale at the last size. It rises to there from `guidance_scale` at the first. null: `guidance_scale` at
    all sizes. A pair: at 2x and at 4x."""
    guidance_exponent: Exponent = 0.5
    """How guidance rises: 1 evenly from size to size, 0.5 quickly at first, 0 at once after the first size."""
    bands: Literal["wavelet", "sizes"] = "wavelet"
    """What `guidance_low` calls low frequencies. `wavelet`: the low band of a wavelet. `sizes`: what the size before
    can hold (FreCaS). The first size then has `guidance_scale` alone."""
    enlarge: Literal["bicubic", "nearest"] = "bicubic"
    """How images are enlarged."""
    sharpen: float = Field(default=0.0, ge=0, le=4)
    """How much enlarged images are sharpened (DiffuseHigh: 1)."""
    swap: Literal["none", "latents", "pixels"] = "none"
    """Whether the first steps at each later size take their low frequencies from the enlarged image. `pixels`: of the
    decoded image, by a wavelet (DiffuseHigh); each such step decodes and encodes. `latents`: means of 2 x 2 latents,
    which costs nothing."""
    swap_until: float = Field(default=0.33, ge=0, le=1)
    """With a swap, the fraction of a size's steps that have one."""
    neighbourhood: bool | None = None
    """Self-attention sees the native-size neighbourhood of each place alone (ScaleDiff). Large canvases are then
    computed much faster, and objects repeat less. Only for UNets and PixArt. null: on canvases of at least 2.5 x 2.5
    times the native size, if the model is one of these."""

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        leave, gamma = at_scale(self.leave, self.scale), at_scale(self.gamma, self.scale)
        if self.restart is None and leave == 1:
            raise ValueError("leave 1 finishes every size, so later sizes begin anew; set restart, such as 0.7")
        if self.restart is not None and self.restart >= leave:
            raise ValueError(f"restart ({self.restart:g}) must be less than leave ({leave:g})")
        if self.restart is not None and gamma:
            raise ValueError("gamma is set, but is read only with restart: null; set that too, or drop gamma")
        return self

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and self.first == "low_res"

    def needs(self) -> Mapping[Ability, str]:
        """Neighbourhoods change self-attention, where they are asked for."""
        return {"attention": "upscale.neighbourhood"} if self.neighbourhood else {}

    def timing(self, grid: Grid) -> Timing:
        """That of an image of the canvas's size, or of the native size if the canvas is larger."""
        return timing_of(self.time_shift, grid, min(grid.height * grid.width, grid.window**2))

    # ------------------------------------------------------------------------------------------------ the plan

    def _last_scale(self) -> float:
        """The guidance scale at the last size."""
        return self.guidance_scale if self.guidance_last is None else at_scale(self.guidance_last, self.scale)

    def phases_of(self) -> tuple[Phase, ...]:
        """All sizes, the first one included even where the low-res image stands for it."""
        scales = (1.0, *phase_scales(self.scale, self.phases, refine=False))
        if self.first == "noise":
            scales = tuple(dict.fromkeys(scales))
        last, leave = max(1, len(scales) - 1), at_scale(self.leave, self.scale)
        found: list[Phase] = []
        for number, scale in enumerate(scales):
            ends = between(leave, 1.0, number / last, self.exponent) if len(scales) > 1 else 1.0
            guidance = between(self.guidance_scale, self._last_scale(), number / last, self.guidance_exponent)
            found.append(Phase(scale, self._begins(found[-1], scale) if found else 0.0, ends, guidance))
        return tuple(found)

    def _begins(self, before: Phase, scale: float) -> float:
        """Where the size after `before` begins."""
        if self.restart is not None:
            return self.restart
        if not (gamma := at_scale(self.gamma, self.scale)):
            return before.ends
        timestep = noisier(round(1000 * (1 - before.ends)), (before.scale / scale) ** gamma)
        return round(1 - timestep / 1000, 9)

    def timesteps(self) -> tuple[tuple[int, ...], ...]:
        """The timesteps of each size, evenly spaced from its first to its last, where sizes do not share one path.
        They are SDXL's."""
        import numpy as np

        if not at_scale(self.gamma, self.scale) and self.middle is None:
            return ()
        phases = self.phases_of()
        counts = [round((phase.ends - phase.begins) * self.steps) for phase in phases]
        if self.middle is not None and len(phases) > 1:
            counts[1:-1] = [round(self.middle * self.steps)] * (len(phases) - 2)
            counts[-1] = self.steps - sum(counts[:-1])
        found = []
        for phase, count in zip(phases, counts):
            begin, end = min(999, round(1000 * (1 - phase.begins))), round(1000 * (1 - phase.ends))
            count = min(max(1, count), begin - end + 1)
            found.append(tuple(int(t) for t in np.linspace(begin, end, count)))
        return tuple(found)

    def parts(self, course: Course) -> tuple[range, ...]:
        """The indices of the steps of each size, on the path that sizes share. Empty where a size gets none."""
        every = len(course.done)
        return tuple(
            range(course.first(phase.begins), every if phase.ends == 1 else course.first(phase.ends))
            for phase in self.phases_of()
        )

    def lengths(self, course: Course) -> list[int]:
        """The number of steps of each size. 0: the size is not drawn."""
        counts = [len(each) for each in self.timesteps() or self.parts(course)]
        return [0, *counts[1:]] if self.first == "low_res" else counts

    def canvases(self, height: int, width: int, multiple: int) -> list[tuple[int, int]]:
        """(rows, columns) of each size on the way to `height` x `width` latents."""
        scales = [phase.scale for phase in self.phases_of()]
        return [(rows, cols) for _, rows, cols in phase_sizes(height, width, scales, multiple)]

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The canvas of each size at each of its steps."""
        canvases = self.canvases(grid.height, grid.width, grid.multiple)
        for phase, count, canvas in zip(self.phases_of(), self.lengths(course), canvases):
            branches = 2 if course.guided and phase.guidance > 1 else 1
            if count:
                yield UnetWork(count * branches, area(*canvas, grid))

    # ------------------------------------------------------------------------------------------------ the work

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass per size that is drawn."""
        geometry = request.models.geometry
        canvases = self.canvases(*request.canvas_size, geometry.multiple)
        drawn = [number for number, count in enumerate(self.lengths(request.course)) if count]
        passes = []
        for number in drawn:
            (rows, cols), path = canvases[number], self.path(request, number)
            own = self.model_copy(update={"guidance_scale": self.phases_of()[number].guidance})
            here = replace(request.sized(rows, cols), config=own)
            leg = Leg(here, own, path, tuple(canvases[: number + 1]))
            begin = leg.from_noise if self.first == "noise" and number == drawn[0] else leg.from_image
            passes.append(Pass(rows, cols, begin, path=path))
        return tuple(passes)

    def path(self, request: Request, number: int) -> tuple[Step, ...]:
        """The steps of a size, of which the last one ends at x0."""
        from resmaster_stages.models.flow import flow_path

        shared, own = request.path, self.timesteps()
        if not own:
            part = self.parts(request.course)[number]
            steps = shared[part.start : part.stop]
            return steps if part.stop == len(shared) else (*steps[:-1], replace(steps[-1], alpha_next=1, sigma_next=0))
        if shared[0].prediction_type == "flow":
            return flow_path([*(flow_level(t) for t in own[number]), 0.0])
        timing = replace(self.timing(request.views()), timesteps=own[number])
        return request.models.base.path(len(own[number]), timing)


@dataclass(frozen=True, eq=False)
class Leg:
    """One size of one batch of images."""

    request: Request
    """For this size: its canvas, and its guidance scale."""
    settings: Cascade
    path: tuple[Step, ...]
    canvases: tuple[tuple[int, int], ...]
    """(rows, columns) of the sizes up to this one."""

    def from_noise(self, previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
        """The start of a first size."""
        return step.pure(noise()), self.compose()

    def from_image(self, previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
        """The start of a later size: the image before, enlarged and noised."""
        import torch

        from resmaster_stages.diffusion import autoencoder
        from resmaster_stages.diffusion.reference import enlarged, sharpened

        request, settings = self.request, self.settings
        image = enlarged(request.image_before(previous), request.height, request.width, settings.enlarge)
        if settings.sharpen:
            sigmas = [0.1 + 1.9 * torch.rand((), generator=each) for each in noise.generators]
            image = sharpened(image, settings.sharpen, torch.stack(sigmas).to(image.device))
        x0 = autoencoder.encode(request.models, image)
        return step.noised(x0, noise()), self.compose(self.swap(image, x0))

    def compose(self, x0_hooks: tuple[X0Hook, ...] = ()) -> Composition:
        """The whole canvas as one view."""
        factor = self.request.models.geometry.latent_factor
        native = self.settings.micro_conditioning == "native"
        size = [side * factor for side in self.canvases[0]] if native else None
        composition = whole_canvas_composition(self.request, self.guidance(), patches=self.patches(), size=size)
        return replace(composition, x0_hooks=x0_hooks)

    def patches(self) -> tuple[Patch, ...]:
        """The patch that limits self-attention, where it is to be limited."""
        from resmaster_stages.diffusion.neighbourhood import Tiles, neighbourhood

        base, (rows, cols) = self.request.models.base, self.canvases[-1]
        limited, native = self.settings.neighbourhood, base.geometry.native
        if limited is None:
            limited = "attention" in base.family.abilities and rows * cols >= (LARGE * native) ** 2
        return (partial(neighbourhood, tiles=Tiles(rows, cols, native, jitter=True)),) if limited else ()

    def guidance(self) -> ClassifierFree:
        """The guidance rule of this size."""
        from resmaster_stages.diffusion.guidance import ByBand, ClassifierFree

        rule = self.settings.guided_by_band(self.request.models, self.settings.guidance_scale)
        if self.settings.bands == "wavelet" or not isinstance(rule, ByBand):
            return rule
        if len(self.canvases) == 1:
            return ClassifierFree(rule.scale, rule.stop, rule.mix)
        return replace(rule, split=partial(held_by, size=self.canvases[-2]))

    def swap(self, image: Tensor, x0: Tensor) -> tuple[X0Hook, ...]:
        """The hook that takes low frequencies from the enlarged images [B, 3, H, W] and their latents [B, C, h, w]."""
        from resmaster_stages.diffusion.frequency import block_means, swap_low_frequencies
        from resmaster_stages.diffusion.wavelets import low_band

        models, kind = self.request.models, self.settings.swap
        acting = {step.index for step in self.path[: round(self.settings.swap_until * len(self.path))]}
        if kind == "none" or not acting:
            return ()

        def swapped(predicted: Tensor, step: Step) -> Tensor:
            if step.index not in acting:
                return predicted
            if kind == "latents":
                return swap_low_frequencies(predicted, x0, block_means)
            return swapped_in_pixels(models, predicted, image, partial(low_band, wavelet="db4"))

        return (swapped,)


def held_by(x: Tensor, size: tuple[int, int]) -> Tensor:
    """What a canvas of `size` (rows, columns) can hold of `x` [N, C, H, W]: reduced bilinearly, without a filter, and
    enlarged again (FreCaS)."""
    import torch.nn.functional as F

    small = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def swapped_in_pixels(models: Models, x0: Tensor, image: Tensor, low: LowPass) -> Tensor:
    """Latents `x0` [B, C, h, w] whose decoded images have the low frequencies of `image` [B, 3, H, W]."""
    from resmaster_stages.diffusion import autoencoder
    from resmaster_stages.diffusion.frequency import swap_low_frequencies

    pixels = autoencoder.decode(models, x0)
    return autoencoder.encode(models, swap_low_frequencies(pixels, image.to(pixels.device), low))
