"""C-Upscale (IJCV 2025): views are denoised from the noised reference, with three priors.

- global structure: the low frequencies of every predicted x0 come from the reference (`structure`);
- regional semantics: each view has its own caption;
- regional attention: a view attends to the global prompt only as much as the whole image does at that place.

From the authors' abstract and public notes: the three priors, the start from the noised reference, overlapping views.
There is no public code, and the paper's tables and constants were not at hand. Our reconstruction: the composer of
regional attention and captions (`diffusion.composer`) and its share of one half; the filter (ResMaster's, with the
cutoff in Nyquist frequencies of the low-res image, at every step); the start at 45 % of the noise, which third-party
notes give. Preset `faithful` is the same as `default`, because nothing more faithful is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import Steered, Wrapping, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.composer import Composer
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, LatentHook, Patch
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step


@register
class CUpscale(Steered, Wrapping):
    """Views denoised from the noised low-res image: the image changes less than by ResMaster."""

    # The path begins where ResMaster's swap has nearly ended, so the swap acts at every step, with the lower cutoff.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"structure": {"preset": "lr_nyquist"}} for name in ("default", "faithful")
    }

    method: Literal["c_upscale"] = "c_upscale"
    start: float = Field(default=0.55, ge=0, lt=1)
    """Fraction of the steps that is left out at the noisy end. A higher value keeps the result closer to the low-res
    image."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Share of the global prompt, as the whole image attends to it. The rest is each view's caption. 0: no
    composer."""

    def needs(self) -> Mapping[Ability, str]:
        """The composer changes cross-attention."""
        own: Mapping[Ability, str] = {"attention": "upscale.share"} if self.share else {}
        return {**super().needs(), **own}

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The views and, with a composer, the low-res image by one branch; with a time-matched anchor once more."""
        left = self.left(self.start, course)
        yield from self.views_work(left, len(grid), area(*grid.window_size, grid), course)
        if self.share:
            yield UnetWork(len(left), self.small_area(grid))
        yield from self.anchor_work(left, grid, course)

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass that starts from the noised reference."""
        request.required_reference()

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            draw = noise()
            x0 = request.roughened(request.followed, noise)
            return step.noised(x0, draw), self.compose(request, noise)

        return (Pass(*request.canvas_size, begin, request.course.first(self.start)),)

    def compose(self, request: Request, noise: CanvasNoise) -> Composition:
        """A grid of views, each with its caption, and a composer for their cross-attention."""
        from resmaster_stages.diffusion.composer import Composer
        from resmaster_stages.diffusion.fusing import Fuser
        from resmaster_stages.diffusion.loop import Composition, ViewGroup, always
        from resmaster_stages.diffusion.steppers import make_stepper

        models, grid, reference = request.models, request.views(), request.required_reference()
        look: tuple[LatentHook, ...] = ()
        patches: tuple[Patch, ...] = ()
        apart: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.share:
            small = reference.small_latents.shape[-2:]
            composer = Composer(grid, small, self.share, models.device)
            look = (whole_image(request, composer, noise.resized(*small)()),)
            patches, apart = (composer.patch,), composer.capturing
        conditions = request.view_conditions(self.micro_conditioning)
        views = Fuser(grid, self.fuse, models.device)
        return Composition(
            groups=(ViewGroup(always(views, conditions), self.guidance(request.models)),),
            stepper=make_stepper(self.stepper),
            latent_hooks=look,
            x0_hooks=self.structural_guidance(request, noise, apart),
            patches=patches,
        )


def whole_image(request: Request, composer: Composer, draw: Tensor) -> LatentHook:
    """The hook that predicts the low-res images, noised by `draw` [B, C, h, w], before each step.

    The composer keeps the attention maps of these predictions.
    """
    from resmaster_stages.diffusion.guidance import ClassifierFree
    from resmaster_stages.methods.small_image import predictor

    small = predictor(request, draw, ClassifierFree(1.0))

    def look(z: Tensor, step: Step) -> Tensor:
        with composer.capturing():
            small(step, composer.call)
        return z

    return look
