"""ResMaster (AAAI 2025): MultiDiffusion whose views follow a low-res reference.

It makes three additions to MultiDiffusion. Each can be switched off, and without all three it is MultiDiffusion:
- structural guidance (SG, eq. 5 to 7): the low frequencies of every predicted x0 come from the reference's latents;
- tailored image prompts (TIP, eq. 8): each view's own crop of the reference, through the IP-Adapter;
- enhanced text prompts (ETP): each view's own caption.

This file differs from the paper's wording on purpose. The swap acts on the fused canvas instead of each view (the
result is the same away from view borders, and has no seams). The reference is encoded once instead of per view. The
step is deterministic unless `stepper: posterior` asks for eq. 7. The swap ends after 60 % of the steps. Preset
`faithful` is the paper read literally: eq. 7, and the swap at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import Source, register
from resmaster_stages.config.part import Part
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import MovingViews, Steered

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.loop import CanvasNoise, Composition
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step


class ImagePromptConfig(Part):
    """Tailored image prompts (ResMaster eq. 8): each view's own crop of the reference through the IP-Adapter."""

    enabled: bool = True
    """Off: the paper's ablation without image prompts."""
    scale: float = Field(default=0.8, ge=0, le=2)
    """Weight of the image cross-attention (the paper's lambda)."""


FEWER_ROWS: dict[str, Any] = {
    "stepper": "dpmpp_2m",
    "steps": 25,
    "guidance_stop": 0.7,
    "init": "noised_lr",
    "start": 0.3,
    "shift": "every_step",
    "shift_stride": 1.0,
    "fuse": "linear",
    "shift_stop": 0.78,
}
"""Settings that leave out most of the work.

- A solver of second order takes half the steps.
- The last 30 % of the steps have no guidance.
- The first 30 % of the steps are left out, because the image only becomes the reference there.
- Views move without overlapping. In the last five of 25 steps they stand still and overlap, with feathered borders.
"""


@register
class ResMaster(MovingViews, Steered):
    """Views that follow the low-res image: structure is kept and detail is added, for images of any size.

    The default leaves out most of the work (five sixths at 4x). `preset: exact` does all of the work.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": FEWER_ROWS,
        "faithful": {"stepper": "posterior", "structure": {"preset": "paper"}},
        "exact": {},
    }
    reads: ClassVar[tuple[Source, ...]] = ("reference", "captions", "image_prompt")
    switches: ClassVar[Mapping[str, str]] = {"sg": "structure", "tip": "image_prompt", "etp": "text_prompt"}

    method: Literal["resmaster"] = "resmaster"
    image_prompt: ImagePromptConfig = ImagePromptConfig()
    """Tailored image prompts."""

    def uses(self, what: Source) -> bool:
        """Whether the result depends on `what`."""
        return super().uses(what) and (what != "image_prompt" or self.image_prompt.enabled)

    @property
    def image_scale(self) -> float:
        """Weight of image prompts. 0 if they are off."""
        return self.image_prompt.scale if self.image_prompt.enabled else 0.0

    def needs(self) -> Mapping[Ability, str]:
        """Image prompts need an IP-Adapter."""
        own: Mapping[Ability, str] = {"image_prompts": "upscale.image_prompt.enabled"} if self.image_scale else {}
        return {**super().needs(), **own}

    def label(self) -> str:
        """The method's name and the parts that are on."""
        parts = {
            "structure": self.structure.enabled,
            "image prompts": self.image_prompt.enabled,
            "patch captions": self.text_prompt.enabled,
            "ControlNet": self.control.acting,
        }
        return f"{self.method} ({', '.join(name for name, on in parts.items() if on) or 'no guidance'})"

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The views and, with a time-matched anchor, the low-res image."""
        yield from super().work(grid, course)
        yield from self.anchor_work(self.left(self.start, course), grid, course)

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass, with structural guidance by the reference."""
        (free,) = super().passes(request)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            z, composition = free.begin(previous, noise, step)
            return z, replace(composition, x0_hooks=self.structural_guidance(request, noise))

        return (replace(free, begin=begin),)

    def compose(self, request: Request) -> Composition:
        """A grid of views, each with its own crop and caption."""
        from resmaster_stages.diffusion.image_prompts import embed_crops, embed_images
        from resmaster_stages.diffusion.loop import Composition, ViewGroup
        from resmaster_stages.diffusion.steppers import make_stepper

        models, grid, reference = request.models, request.views(), request.required_reference()
        image = None
        if self.image_scale and request.image_prompts is not None:
            image = embed_images(models, request.image_prompts)
        elif self.image_scale:
            image = embed_crops(models, reference.pixels, grid.canvas_boxes)
        conditions = request.view_conditions(self.micro_conditioning, image)
        return Composition(
            groups=(ViewGroup(self.placed(grid, conditions, models.device), self.guidance(request.models)),),
            stepper=make_stepper(self.stepper),
            image_scale=self.image_scale,
        )
