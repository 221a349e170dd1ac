"""Direct inference (SDXL-DI): the UNet sees the whole canvas at once.

At the model's native size this is plain SDXL, and how low-res pictures are made. Beyond it, objects repeat and layouts
collapse: the baseline that every tuning-free method is measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import Guidance, Moment
from resmaster_stages.diffusion.loop import Composition, LatentHook, Patch, ViewGroup, always
from resmaster_stages.diffusion.steppers import make_stepper
from resmaster_stages.methods.request import Request


def whole_canvas_composition(
    request: Request,
    *,
    guidance: Guidance | None = None,
    latent_hooks: tuple[LatentHook, ...] = (),
    patches: tuple[Patch, ...] = (),
    moment: Moment | None = None,
    size: Sequence[int] | None = None,
) -> Composition:
    """One view, the canvas, for methods that change what the UNet makes of it.

    size: (height, width) in px that the UNet is told instead of the canvas's.
    """
    config, grid = request.config, request.canvas()
    conditions = make_conditions(
        request.models,
        grid,
        request.prompts,
        request.negative_prompts,
        guided=request.guided,
        micro_conditioning=config.micro_conditioning,
        sizes=[(*size, 0, 0, *size)] * len(request.prompts) if size else None,
    )
    return Composition(
        groups=(
            ViewGroup(
                always(Fuser(grid, "uniform", request.models.device), conditions),
                guidance or request.guidance(),
            ),
        ),
        stepper=make_stepper(config.stepper),
        latent_hooks=latent_hooks,
        patches=patches,
        moment=moment or Moment(),
    )


def compose(request: Request) -> Composition:
    """One view: the canvas."""
    return whole_canvas_composition(request)
