"""Direct inference (SDXL-DI): the UNet sees the whole canvas at once.

At the model's native size this is plain SDXL. Low-res images are made this way. Beyond the native size, objects repeat
and layouts collapse. Every tuning-free method is measured against this baseline.

Transformers with rotary positions can be told that the canvas is larger than what they were trained on: `positions` and
`attention`, as I-Max and HiFlow do beside their guidance. An image that wraps is drawn by circular convolutions, which
only UNets have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from resmaster_stages.config.method import register
from resmaster_stages.config.part import Later
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.settings import FromNoise, LateGuidance, MicroConditioned, Wrapping, area, timing_of
from resmaster_stages.models.schedule import Timing

if TYPE_CHECKING:
    from resmaster_stages.diffusion.guidance import Guidance
    from resmaster_stages.diffusion.loop import Composition, LatentHook, Patch, X0Hook
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course


@register
class Direct(FromNoise, LateGuidance, MicroConditioned, Wrapping):
    """The whole canvas at once: for the native size, and as a baseline."""

    in_one_piece: ClassVar[bool] = True
    version: ClassVar[int] = 2

    method: Literal["direct"] = "direct"
    positions: Literal["own", "ntk", "yarn"] = Later("own")
    """Rotary positions of a transformer on a canvas beyond its native size. `own`: counted on. `ntk`: NTK scaling with
    a floor (I-Max). `yarn`: YaRN by parts, with its temperature of attention. UNets have no such positions."""
    attention: Literal["plain", "proportional"] = Later("plain")
    """`proportional`: attention is sharpened by the number of tokens of the canvas (I-Max), instead of by YaRN's
    temperature. Only for transformers with rotary positions."""

    def needs(self) -> Mapping[Ability, str]:
        """Rotary positions, where they are changed, and convolutions, where the image wraps."""
        needs: dict[Ability, str] = {"convolutions": "upscale.wrap"} if any(self.wraps) else {}
        if self.scales_positions:
            needs["positions"] = "upscale.positions" if self.positions != "own" else "upscale.attention"
        return needs

    @property
    def scales_positions(self) -> bool:
        """Whether a transformer is told that the canvas is larger than what it was trained on."""
        return self.positions != "own" or self.attention != "plain"

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas at every step."""
        yield UnetWork(self.rows(self.left(self.start, course), course), area(grid.height, grid.width, grid))

    def timing(self, grid: Grid) -> Timing:
        """That of an image of the canvas's size, or of the native size if the canvas is larger."""
        return timing_of(self.time_shift, grid, min(grid.height * grid.width, grid.window**2))

    def compose(self, request: Request) -> Composition:
        """One view: the whole canvas."""
        return whole_canvas_composition(
            request,
            self.guidance(request.models),
            patches=self._patches(request),
            micro_conditioning=self.micro_conditioning,
        )

    def _patches(self, request: Request) -> tuple[Patch, ...]:
        """The patches that make the image wrap, or that scale positions and attention, where that is asked for."""
        from resmaster_stages.diffusion.circular import circular
        from resmaster_stages.diffusion.positions import Scaling, scaled_positions

        if any(self.wraps):
            return (lambda denoiser, call: circular(denoiser, self.wraps),)
        if not self.scales_positions:
            return ()
        geometry = request.models.geometry
        height, width = (side // geometry.multiple for side in request.canvas_size)
        scaling = Scaling(
            self.positions,
            self.attention,
            height,
            width,
            native=geometry.native // geometry.multiple,
            text=request.models.base.tokens,
        )
        return (lambda denoiser, call: scaled_positions(denoiser, scaling),)


def whole_canvas_composition(
    request: Request,
    guidance: Guidance,
    *,
    latent_hooks: tuple[LatentHook, ...] = (),
    x0_hooks: tuple[X0Hook, ...] = (),
    patches: tuple[Patch, ...] = (),
    freeu: bool = False,
    micro_conditioning: str = "canvas",
    size: Sequence[int] | None = None,
) -> Composition:
    """A composition with the whole canvas as its one view, for methods that change how the UNet computes it.

    size: (height, width) in px for the UNet's size conditions, instead of those that `micro_conditioning` gives: the
    canvas, or the native size for its shape.
    """
    from resmaster_stages.diffusion.conditions import make_conditions
    from resmaster_stages.diffusion.freeu import freeu as freeu_on
    from resmaster_stages.diffusion.fusing import Fuser
    from resmaster_stages.diffusion.loop import Composition, ViewGroup, always
    from resmaster_stages.diffusion.steppers import make_stepper
    from resmaster_stages.diffusion.views import native_size

    grid = request.canvas()
    if size is None and micro_conditioning == "native":
        size = native_size(request.models.geometry, request.height, request.width)
    conditions = make_conditions(
        request.models,
        grid,
        request.prompts,
        request.negative_prompts,
        guidance_scale=request.config.guidance_scale,
        sizes=[(*size, 0, 0, *size)] * len(request.prompts) if size else None,
    )
    return Composition(
        groups=(ViewGroup(always(Fuser(grid, "uniform", request.models.device), conditions), guidance),),
        stepper=make_stepper(request.config.stepper),
        latent_hooks=latent_hooks,
        x0_hooks=x0_hooks,
        patches=(*patches, lambda denoiser, call: freeu_on(denoiser)) if freeu else patches,
    )
