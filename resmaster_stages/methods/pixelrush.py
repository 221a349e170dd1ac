"""PixelRush (arXiv 2602.12769, 2026): the image doubles, and every doubling takes two evaluations of a view.

Each phase enlarges the image of the phase before in RGB and encodes it. Then, on overlapping native-size views:
- partial inversion: one prediction at t = 0 gives the noise that brings the latents to the noise level of timestep
  `noised_to`;
- one step of few-step weights from there to the clean image. Before the step, the predicted noise is turned towards
  random noise by spherical interpolation (`keep`), which brings detail;
- predictions are fused, in preset `faithful` with feathered weights; there is no guidance.

From the authors' paper (there is no code): all of the above, timestep 249, the number 0.95, and preset `faithful`. The
paper does not say of which noise 0.95 is the share. As a share of the random noise it would add more noise than the
step takes away, so here it is that of the predicted noise. The width of the feathers is from a reimplementation.

Ours: random noise is drawn once for the canvas instead of for each view, because noise per view would average away
where views overlap. The inverting predictions are fused like the others. Interpolation is over the whole canvas of a
sample. More steps than one are possible. Preset `default` fuses with linear weights, because under feathered ones
borders of views show in flat areas. Without `model.few_step` the base model itself takes the step, which the plan says;
the authors always have few-step weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from resmaster_stages.config.method import Source, register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import Following, Fuse, InPhases, MicroConditioned, area
from resmaster_stages.models.schedule import Step, Timing, timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.config.model import ModelConfig
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition
    from resmaster_stages.diffusion.steppers import Stepper
    from resmaster_stages.methods.passes import Begin
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Asked
    from resmaster_stages.models.schedule import Course


@register
class PixelRush(MicroConditioned, Following, InPhases):
    """Two evaluations of a view for every doubling: very fast, made for few-step weights (`model.few_step`)."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "faithful": {"fuse": "feather"}}
    reads: ClassVar[tuple[Source, ...]] = ("reference",)

    method: Literal["pixelrush"] = "pixelrush"
    noised_to: int = Field(default=249, ge=1, le=998)
    """The timestep (of 1000) to whose noise level each phase goes back. A higher value draws more anew. 249 is the last
    of four trailing steps, and a step of weights for 4 or 8 steps."""
    steps: int = Field(default=1, ge=1, le=50)
    """Denoising steps from `noised_to` to the clean image, evenly spaced. The paper takes one."""
    keep: float = Field(default=0.95, ge=0, le=1)
    """Share of the predicted noise in the spherical interpolation with random noise. 1: no random noise. A lower value
    gives more detail and more grain."""
    guidance_scale: float = Field(default=1.0, ge=1, le=1)
    """There is no guidance."""
    stride: float = Field(default=0.5, gt=0, le=1)
    """Distance of neighbouring views, as a fraction of the window (the model's native size)."""
    fuse: Fuse = "linear"
    """Weight of a view's pixels where views overlap, as in other methods of views. The paper has `feather`, which keeps
    half a view's weight at its border."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps > self.noised_to + 1:
            raise ValueError(
                f"steps {self.steps} are more than the {self.noised_to + 1} timesteps below noised_to "
                f"({self.noised_to}); use fewer, or a higher noised_to"
            )
        return self

    @property
    def view_stride(self) -> float:
        """Distance of neighbouring views, as a fraction of the window."""
        return self.stride

    def asked(self) -> Asked:
        """No number of steps: the path is the method's own."""
        return replace(super().asked(), steps=None)

    def notes(self, model: ModelConfig) -> Iterator[str]:
        """That few-step weights are missing."""
        if model.few_step is None:
            yield (
                "method pixelrush: model.few_step names no few-step weights, so the base model takes its one step; the "
                "paper's quality needs such weights"
            )

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The views of every phase, once to invert and once for every step."""
        for _, height, width in self.canvases(grid):
            phase = replace(grid, height=height, width=width)
            yield UnetWork((1 + self.steps) * len(phase), area(*phase.window_size, grid))

    def path(self, request: Request) -> tuple[Step, ...]:
        """The inverting step from the clean image, and the steps back to it."""
        cells = request.views().window_height * request.views().window_width
        times = timesteps(self.steps, self.noised_to + 1, "trailing", 0)
        down = request.models.base.path(self.steps, Timing(cells, timesteps=tuple(times)))
        first, count = down[0], len(down) + 1
        up = replace(first, t=0, alpha=1.0, sigma=0.0, alpha_next=first.alpha, sigma_next=first.sigma)
        return tuple(replace(step, index=index, count=count) for index, step in enumerate((up, *down)))

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass per size."""
        path = self.path(request)
        return tuple(
            Pass(rows, cols, self.beginning(request, rows, cols), path=path)
            for _, rows, cols in self.canvases(request.views())
        )

    def beginning(self, request: Request, rows: int, cols: int) -> Begin:
        """The start of the pass of `rows` x `cols` latents: the image of the pass before, enlarged and encoded."""
        here = request.sized(rows, cols)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            latents = request.latents_before(previous, rows, cols)
            return request.roughened(latents, noise), self.compose(here)

        return begin

    def compose(self, request: Request) -> Composition:
        """A grid of views that all have the global prompt."""
        from resmaster_stages.diffusion.fusing import Fuser
        from resmaster_stages.diffusion.guidance import ClassifierFree
        from resmaster_stages.diffusion.loop import Composition, ViewGroup, always
        from resmaster_stages.diffusion.steppers import make_stepper

        conditions = request.view_conditions(self.micro_conditioning)
        views = Fuser(request.views(), self.fuse, request.models.device)
        return Composition(
            groups=(ViewGroup(always(views, conditions), ClassifierFree(self.guidance_scale)),),
            stepper=Rushed(self.keep, make_stepper(self.stepper)),
        )


@dataclass(frozen=True)
class Rushed:
    """The stepper of a pass: inverts, turns the predicted noise of the first step back, and goes on as `then` does."""

    keep: float
    then: Stepper

    def __call__(self, z: Tensor, x0: Tensor, eps: Tensor, step: Step, noise: Callable[[], Tensor]) -> Tensor:
        from resmaster_stages.diffusion.steppers import ddim_keep

        if step.index == 0:
            return ddim_keep(z, x0, eps, step, noise)
        if step.index == 1 and self.keep < 1:
            eps = slerp(noise(), eps, self.keep)
            x0 = (z - step.sigma * eps) / step.alpha
        return self.then(z, x0, eps, step, noise)


NEARLY_STRAIGHT = 1e-6
"""Sine of the angle below which two tensors are interpolated in a straight line."""


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation from `start` (share 0) to `end` (share 1), over the whole tensor of each sample
    [B, C, H, W]. Lengths are not changed beside."""
    import torch

    cosine = torch.cosine_similarity(start.flatten(1), end.flatten(1), dim=1)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    straight = sine < NEARLY_STRAIGHT
    safe = sine.masked_fill(straight, 1.0)

    def weight(part: float) -> Tensor:
        found = torch.where(straight, part, torch.sin(part * angle) / safe)
        return found.view(-1, 1, 1, 1).to(start.dtype)

    return weight(1 - share) * start + weight(share) * end
