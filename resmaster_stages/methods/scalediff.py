"""ScaleDiff (Koh et al., NeurIPS 2025): a cascade of whole-canvas passes whose attention is local.

Each pass starts from the result of the one before, first from the low-res image, adds noise up to step 30 of 50 and
denoises from there, with
- neighbourhood attention: every self-attention sees the native-size window around each place (`neighbourhood`);
- latent frequency mixing: the reference takes its high frequencies from the image enlarged in RGB, and its low ones
  from the latents enlarged as latents: ref = R + LP(L - R);
- structure guidance: the low frequencies of x0 are pulled to those of the reference, by a weight that falls with the
  share of noise in the latents: x0 + gamma LP(ref - x0), gamma = (1 - abar_t) / (1 - abar_t0), which is 1 at the
  pass's first step t0. The noise is then derived from z and the edited x0 (`ddim_implied`).

LP(x) is `resampled`: bilinearly reduced to an eighth, and bilinearly enlarged again.

From the authors: all of the above, and preset `faithful`. Their program for SDXL was not at hand, only their scripts
and a third party's description, so its size conditions and its sampler are not known; here the size is the canvas's.
Their program for FLUX moves the tiles of queries at random. Ours: in preset `default` the tiles move from step to step,
by a fixed sequence, because tiles that stand still leave borders. The two cutoffs and the weight of the guidance can be
set apart. On a flow path, 1 - abar is the share of noise in the variance, sigma^2 / (alpha^2 + sigma^2), which is the
same number at the same noise level. Images between two passes are clamped to [-1, 1], decoded and encoded in blended
tiles, and encoded to the mode instead of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import Source, register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import Following, InPhases, LateGuidance, MicroConditioned, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.loop import CanvasNoise, Composition
    from resmaster_stages.methods.passes import Begin
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step


@register
class ScaleDiff(LateGuidance, MicroConditioned, Following, InPhases):
    """A cascade of whole canvases with local attention: fast, and close to the low-res image."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "faithful": {"jitter": False}}
    reads: ClassVar[tuple[Source, ...]] = ("reference",)
    in_one_piece: ClassVar[bool] = True
    own_way: ClassVar[Literal["image", "latent", "mixed"]] = "mixed"

    method: Literal["scalediff"] = "scalediff"
    start: float = Field(default=0.6, ge=0, lt=1)
    """Fraction of the steps that each pass leaves out at the noisy end. A higher value keeps the result closer to the
    low-res image."""
    mix_cutoff: float = Field(default=0.125, gt=0, le=1)
    """Where the low frequencies that are taken from enlarged latents end: the size to which latents are reduced, as a
    fraction. Read only with `reference.enlarge: own`, the mixture."""
    structure_weight: float = Field(default=1.0, ge=0, le=1)
    """Pull of low frequencies to those of the enlarged image, at the first step of a pass. The pull falls with the
    noise. 0: no pull."""
    structure_cutoff: float = Field(default=0.125, gt=0, le=1)
    """Where the low frequencies of this pull end: the size to which latents are reduced, as a fraction."""
    jitter: bool = True
    """Move the tiles of attention from step to step, so that their borders do not show."""

    def needs(self) -> Mapping[Ability, str]:
        """Self-attention is replaced."""
        return {"attention": "method scalediff"}

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas of every pass."""
        for _, height, width in self.canvases(grid):
            yield UnetWork(self.rows(self.left(self.start, course), course), area(height, width, grid))

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass per size, each of which starts in the middle of the path."""
        request.required_reference()
        first = request.course.first(self.start)
        return tuple(
            Pass(rows, cols, self.beginning(request, rows, cols), first)
            for _, rows, cols in self.canvases(request.views())
        )

    def beginning(self, request: Request, rows: int, cols: int) -> Begin:
        """The start of the pass of `rows` x `cols` latents: the result of the pass before, enlarged and noised."""
        here = request.sized(rows, cols)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            draw = noise()
            if self.enlargement() == "mixed":
                latents = self.mixed(request, previous, rows, cols)
            else:
                latents = request.latents_before(previous, rows, cols)
            reference = request.roughened(latents, noise)
            return step.noised(reference, draw), self.compose(here, reference, step)

        return begin

    def mixed(self, request: Request, previous: Tensor | None, rows: int, cols: int) -> Tensor:
        """The result of the pass before, as latents [B, C, rows, cols]: high frequencies are those of the image
        enlarged in pixels, low ones those of enlarged latents."""
        from resmaster_stages.diffusion.frequency import resampled

        pixels, latents = (request.latents_before(previous, rows, cols, way) for way in ("image", "latent"))
        return pixels + resampled(latents - pixels, self.mix_cutoff)

    def compose(self, request: Request, reference: Tensor, first: Step) -> Composition:
        """The pass on the request's canvas from the step `first`, which is pulled to `reference` [B, C, H, W]."""
        from resmaster_stages.diffusion.frequency import resampled
        from resmaster_stages.diffusion.neighbourhood import Tiles, neighbourhood
        from resmaster_stages.diffusion.reference_guidance import fading_guidance

        tiles = Tiles(*request.canvas_size, request.models.geometry.native, self.jitter)
        low = partial(resampled, fraction=self.structure_cutoff)
        pull = fading_guidance(reference, low, self.structure_weight, first)
        return whole_canvas_composition(
            request,
            self.guidance(request.models),
            x0_hooks=(pull,) if self.structure_weight else (),
            patches=(partial(neighbourhood, tiles=tiles),),
            size=request.required_reference().small.shape[-2:] if self.micro_conditioning == "native" else None,
        )
