"""MultiDiffusion (Bar-Tal et al. 2023): overlapping native-size views, predictions averaged where they overlap.

Every view gets the global prompt, so the prompt's object tends to appear in every window: ResMaster's base row.
"""

from __future__ import annotations

from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.loop import Composition, ViewGroup
from resmaster_stages.diffusion.shifted_views import placed
from resmaster_stages.diffusion.steppers import make_stepper
from resmaster_stages.methods.request import Request


def compose(request: Request) -> Composition:
    """A grid of views with one prompt."""
    config, grid = request.config, request.views()
    conditions = make_conditions(
        request.models,
        grid,
        request.per_view(request.prompts, grid),
        request.per_view(request.negative_prompts, grid),
        guided=request.guided,
        micro_conditioning=config.micro_conditioning,
    )
    return Composition(
        groups=(ViewGroup(placed(grid, conditions, config, request.models.device), request.guidance()),),
        stepper=make_stepper(config.stepper),
    )
