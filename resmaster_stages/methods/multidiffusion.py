"""MultiDiffusion (Bar-Tal et al. 2023): overlapping native-size views, with predictions averaged where they overlap.

Every view gets the global prompt, so the prompt's object tends to appear in every view. This method is the base row of
ResMaster's Table 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from resmaster_stages.config.method import register
from resmaster_stages.methods.settings import MovingViews

if TYPE_CHECKING:
    from resmaster_stages.diffusion.loop import Composition
    from resmaster_stages.methods.request import Request


@register
class MultiDiffusion(MovingViews):
    """Overlapping views with the whole prompt each, averaged where they overlap: for textures and panoramas."""

    method: Literal["multidiffusion"] = "multidiffusion"

    def compose(self, request: Request) -> Composition:
        """A grid of views that all have the global prompt."""
        from resmaster_stages.diffusion.loop import Composition, ViewGroup
        from resmaster_stages.diffusion.steppers import make_stepper

        grid, conditions = request.views(), request.view_conditions(self.micro_conditioning)
        return Composition(
            groups=(ViewGroup(self.placed(grid, conditions, request.models.device), self.guidance(request.models)),),
            stepper=make_stepper(self.stepper),
        )
