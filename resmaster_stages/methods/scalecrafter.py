"""ScaleCrafter (He et al., ICLR 2024): direct inference with deep convolutions dilated by the canvas's scale.

- re-dilation: the taps of the listed convolutions are spread, in the early steps only, where the layout is decided;
- progressive (from 3x on): the dilation falls step by step;
- noise-damped guidance (from 3x on): strongly dilated networks denoise badly, so the unconditional prediction comes from
  a weakly dilated one, while the difference that the prompt makes comes from the strongly dilated one.

Authors' word: the layers and dilations for SDXL at 2048 x 2048, 2560 x 2560, 4096 x 2048 and 4096 x 4096, and preset
`faithful`. Our choice: the rule that gives those at any size; in preset `default` no FreeU, and below 3x the deepest down
block too (the authors' list names one that SDXL does not have). The unconditional half alone runs through the weak
network; the authors' code computes both halves and drops one. Dispersed convolution, which no published SDXL setting
switches on, is not built. The reference is not read, except with `init: noised_lr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

from torch import Tensor

from resmaster_stages.config import ScaleCrafterConfig
from resmaster_stages.diffusion.convolutions import PLAIN, Dilated, LayerRule, changed_layers
from resmaster_stages.diffusion.freeu import freeu
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, Branch, Branches, Moment, guide
from resmaster_stages.diffusion.loop import Composition, Patch
from resmaster_stages.diffusion.patches import chosen_layers
from resmaster_stages.diffusion.schedule import Step
from resmaster_stages.methods import direct
from resmaster_stages.methods.request import Request

WEAK = Branch("weak", False)
"""The negative prompt through the weakly dilated network."""


@dataclass(frozen=True)
class NoiseDamped:
    """weak + scale * (text - negative) before step `until`; classifier-free guidance after it. Scale 1: text alone."""

    scale: float
    until: int

    def branches(self, step: Step) -> Branches:
        if self.scale == 1:
            return (TEXT,)
        return (NEGATIVE, TEXT, WEAK) if step.index < self.until else (NEGATIVE, TEXT)

    def combine(self, outputs: Sequence[Tensor], step: Step) -> Tensor:
        if len(outputs) == 3:
            return outputs[2] + self.scale * (outputs[1] - outputs[0])
        return outputs[0] if len(outputs) == 1 else guide(outputs[0], outputs[1], self.scale)


def moderate(scale: float, down: bool) -> dict[str, float]:
    """Layers and dilations of a canvas less than three times as long as a native picture."""
    places = ["mid_block.resnets", "up_blocks.0.resnets", "up_blocks.0.upsamplers"]
    return dict.fromkeys((["down_blocks.-1.resnets"] if down else []) + places, scale)


def strong(vertical: float, horizontal: float) -> dict[str, float]:
    """Layers and dilations of a larger canvas, from its height and width over a native picture's."""
    scale = max(vertical, horizontal)
    return {
        "down_blocks.-1.resnets": float(ceil(sqrt(vertical * horizontal))),
        **dict.fromkeys(("mid_block.resnets", "up_blocks.0.resnets", "up_blocks.0.upsamplers"), scale),
        **dict.fromkeys(("up_blocks.1.resnets", "up_blocks.1.upsamplers"), 0.75 * scale),
        "up_blocks.2.resnets": 0.5 * scale,
    }


@dataclass(frozen=True)
class Plan:
    """Which layers are dilated by how much, and until which step."""

    strong: Mapping[str, float]
    weak: Mapping[str, float]
    until: int
    damped_until: int
    progressive: bool

    def dilation(self, factor: float, index: int) -> float:
        """Dilation at step `index` of a layer with `factor` at the start."""
        if index >= self.until or factor <= 1:
            return 1.0
        return float(max(ceil(factor * (self.until - index) / self.until), 2)) if self.progressive else factor


def make_plan(vertical: float, horizontal: float, steps: int, settings: ScaleCrafterConfig) -> Plan:
    """The plan of a canvas `vertical` times as high and `horizontal` times as wide as a native picture."""
    scale = max(vertical, horizontal)
    large = scale >= 3
    until = settings.dilate_until if settings.dilate_until is not None else (0.7 if large else 0.6)
    damped = settings.damped_until if settings.damped_until is not None else (0.7 if large else 0.0)
    progressive = settings.progressive if settings.progressive is not None else large
    return Plan(
        strong={} if scale <= 1 else strong(vertical, horizontal) if large else moderate(scale, settings.down),
        weak={} if scale <= 1 else moderate(min(scale, 2.0), False),
        until=round(until * steps),
        damped_until=round(damped * steps) if scale > 1 else 0,
        progressive=progressive,
    )


def layer_rules(unet: object, plan: Plan) -> dict[str, LayerRule]:
    """How each dilated convolution is computed at each step, in the strong and in the weak network."""
    strong_layers, weak_layers = (chosen_layers(unet, each, "scalecrafter") for each in (plan.strong, plan.weak))

    def rule(name: str, index: int, branch: Branch) -> Dilated:
        factor = (weak_layers if branch == WEAK else strong_layers).get(name, 1.0)
        dilation = plan.dilation(factor, index)
        return PLAIN if dilation == 1 else Dilated(dilation)

    return {name: partial(rule, name) for name in strong_layers | weak_layers}


def compose(request: Request) -> Composition:
    """Direct inference, its guidance rule and convolutions replaced."""
    config, settings, moment = request.config, request.config.scalecrafter, Moment()
    native = request.models.native_px
    plan = make_plan(request.height / native, request.width / native, config.steps, settings)
    rules = layer_rules(request.models.unet, plan)
    patches: tuple[Patch, ...] = (partial(changed_layers, rules=rules, moment=moment),)
    if settings.freeu:
        patches = (*patches, freeu)
    return direct.whole_canvas_composition(
        request, guidance=NoiseDamped(config.guidance_scale, plan.damped_until), patches=patches, moment=moment
    )
