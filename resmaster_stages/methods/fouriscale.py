"""FouriScale (Huang et al., ECCV 2024): direct inference with convolutions that are dilated and low-pass filtered.

Dilation alone lets high frequencies alias into the wider taps, so they are removed from the features of a dilated layer
first. A second text branch is filtered weakly and dilated less. It keeps detail and takes its attention maps from the
first text branch. Guidance goes from the negative prediction to the prediction of the second branch. Dilation falls
from step 20 of 50 on and is off from step 35. From there both text branches would be the same, so the second is left
out.

From the authors: all of the above, the SDXL settings, and a floor of 0 for Stable Diffusion 1.5 and 2.1. For these, the
layers at the same places of the deeper UNet are our choice. The authors apply the filter to the spectrum. Here it is
two products with the circulant matrix of its impulse response (the same numbers, without transforms). Our filter is
symmetric in frequency. The authors' mask is off by one bin between positive and negative frequencies. On SDXL the
authors' last step leaves a little noise, ours none. In preset `default` FreeU is off. The reference is not read, except
with `init: noised_lr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from resmaster_stages.config.method import register
from resmaster_stages.diffusion.buckets import base_size
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, Branch, Branches, guide
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.settings import FromNoise, area

if TYPE_CHECKING:
    from torch import Tensor

    from resmaster_stages.diffusion.convolutions import LayerRule
    from resmaster_stages.diffusion.loop import Composition, Patch
    from resmaster_stages.diffusion.patches import Layer
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step

SAMPLING: dict[str, Any] = {"stepper": "ddim_ancestral", "guidance_scale": 5.0}


@register
class FouriScale(FromNoise):
    """Direct inference with dilated and low-pass filtered convolutions. It needs only a prompt."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": SAMPLING,
        "faithful": {**SAMPLING, "negative_prompt": "", "freeu": True},
    }
    version: ClassVar[int] = 2

    method: Literal["fouriscale"] = "fouriscale"
    full_until: float = Field(default=0.4, ge=0, le=1)
    """Fraction of the steps with full dilation."""
    until: float = Field(default=0.7, ge=0, le=1)
    """Fraction of the steps after which there is no dilation."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """Gain of the filter at the highest frequencies. null: the authors' values, 0.6 for SDXL and 0 for its
    predecessors."""
    amplification: float = Field(default=1.0, ge=1)
    """Factor on the guidance scale while dilation is full. The authors suggest 2.4 against blurred results."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.until < self.full_until:
            raise ValueError(f"until ({self.until}) must not be less than full_until ({self.full_until})")
        return self

    def needs(self) -> Mapping[Ability, str]:
        """Convolutions are filtered, and attention maps are shared between branches."""
        return {"convolutions": "method fouriscale", "attention": "method fouriscale"}

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas at every step, with a third branch while layers are filtered."""
        left = self.left(self.start, course)
        height, width = grid.height_px or grid.height * grid.unit_px, grid.width_px or grid.width * grid.unit_px
        plan = make_plan(height, width, grid.window * grid.unit_px, self.steps, self)
        third = max(0, plan.until - left.start) if course.guided and self.guidance_scale > 1 and plan.factor > 1 else 0
        yield UnetWork(self.rows(left, course) + third, area(grid.height, grid.width, grid))

    def compose(self, request: Request) -> Composition:
        """Direct inference with replaced guidance rule, convolutions and self-attention.

        The size condition is the base size of the plan.
        """
        from resmaster_stages.diffusion.convolutions import changed_layers
        from resmaster_stages.diffusion.low_pass import shared_attention

        models = request.models
        plan = make_plan(request.height, request.width, models.geometry.native_px, self.steps, self)
        canvas = [side * models.geometry.latent_factor for side in request.canvas_size]
        covered = (plan.factor * plan.base[0] / canvas[0], plan.factor * plan.base[1] / canvas[1])
        floor = self.floor if self.floor is not None else 0.6 if models.base.layers == "sdxl" else 0.0
        rules = layer_rules(models.base.denoiser, plan, covered, floor)
        patches: tuple[Patch, ...] = (
            partial(changed_layers, rules=rules),
            partial(shared_attention, branch=DETAIL),
        )
        until, full_until = (plan.until, plan.full_until) if rules else (0, 0)
        guidance = DetailGuidance(self.guidance_scale, until, self.amplification, full_until)
        return whole_canvas_composition(request, guidance, patches=patches, freeu=self.freeu, size=plan.base)


DETAIL = Branch("detail", True)
"""The branch with the prompt once more, through the weakly filtered network."""

FILTERED = ("down_blocks.-1.resnets", "mid_block.resnets", "up_blocks.0.resnets", "up_blocks.1.resnets")
DILATED_ONLY = ("up_blocks.0.upsamplers",)


@dataclass(frozen=True)
class Plan:
    """Dilation over the steps, and the base size whose multiple covers the canvas."""

    base: tuple[int, int]
    factor: int
    full_until: int
    until: int

    def dilation(self, index: int) -> float:
        """Dilation at step `index`: full at first, then falling linearly, then off."""
        if index >= self.until:
            return 1.0
        if index < self.full_until:
            return float(self.factor)
        return max((self.factor - 1) * (self.until - index) / (self.until - self.full_until) + 1, 1.0)


def make_plan(height: int, width: int, native_px: int, steps: int, settings: FouriScale) -> Plan:
    """The plan of a canvas of `height` x `width` px."""
    base, factor = base_size(height, width, native_px)
    return Plan(base, factor, round(settings.full_until * steps), round(settings.until * steps))


def layer_rules(unet: Any, plan: Plan, covered: tuple[float, float], floor: float) -> dict[str, LayerRule]:
    """Rules for each changed convolution, at each step and for the strongly and the weakly filtered branches."""
    from resmaster_stages.diffusion.convolutions import PLAIN, Dilated
    from resmaster_stages.diffusion.low_pass import Filtered
    from resmaster_stages.diffusion.patches import chosen_layers

    def rule(filtered: bool, index: int, branch: Branch) -> Layer:
        factor = plan.dilation(index)
        if factor == 1:
            return PLAIN
        weak = branch == DETAIL
        dilation = ceil(max(factor / 1.5, 1)) if weak else ceil(factor)
        return Filtered(factor, dilation, weak, floor, covered) if filtered else Dilated(float(dilation))

    if plan.factor == 1:
        return {}
    both = chosen_layers(unet, dict.fromkeys(FILTERED, 1.0) | dict.fromkeys(DILATED_ONLY, 0.0), "fouriscale")
    return {name: partial(rule, value == 1) for name, value in both.items()}


@dataclass(frozen=True)
class DetailGuidance:
    """negative + scale * (detail - negative) before step `until`, and classifier-free guidance from there on.

    Scale 1: the text branch alone. Before step `amplified_until`, the scale is multiplied by `amplification`.
    """

    scale: float
    until: int
    amplification: float = 1.0
    amplified_until: int = 0

    def branches(self, step: Step) -> Branches:
        if self.scale == 1:
            return (TEXT,)
        return (NEGATIVE, TEXT, DETAIL) if step.index < self.until else (NEGATIVE, TEXT)

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        scale = self.scale * (self.amplification if step.index < self.amplified_until else 1)
        return guide(outputs[0], outputs[-1], scale)
