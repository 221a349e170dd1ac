"""Direct inference (SDXL-DI): the UNet sees the whole canvas at once.

At the model's native size this is plain SDXL, and how low-res pictures are made. Beyond it, objects repeat and layouts
collapse: the baseline that every tuning-free method is measured against.
"""

from __future__ import annotations

from functools import partial

from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import ClassifierFree
from resmaster_stages.diffusion.image_prompts import adapter_scale
from resmaster_stages.diffusion.loop import Composition, ViewGroup, always
from resmaster_stages.diffusion.steppers import STEPPERS
from resmaster_stages.methods.request import Request


def compose(request: Request) -> Composition:
    """One view: the canvas."""
    config, grid = request.config, request.canvas()
    conditions = make_conditions(
        request.models,
        grid,
        request.prompts,
        request.negative_prompts,
        guided=request.guided,
        micro_conditioning=config.micro_conditioning,
    )
    return Composition(
        groups=(
            ViewGroup(
                always(Fuser(grid, "uniform", request.models.device), conditions), ClassifierFree(config.guidance_scale)
            ),
        ),
        stepper=STEPPERS[config.stepper],
        patches=(partial(adapter_scale, scale=0.0),),
    )
