"""ScaleCrafter (He et al., ICLR 2024): direct inference with deep convolutions dilated by the canvas's scale.

- re-dilation: the taps of the listed convolutions are spread, in the early steps only, where the layout is decided;
- progressive (from 3x on): the dilation falls step by step;
- noise-damped guidance (from 3x on): a strongly dilated network denoises badly, so the unconditional prediction comes
  from a weakly dilated network. The difference that the prompt makes comes from the strongly dilated network.

From the authors: the layers, dilations and durations for SDXL at 2048 x 2048, 2560 x 2560, 4096 x 2048 and 4096 x 4096,
for Stable Diffusion 1.5 (native 512) at 1024, 1280 and 2048 px and for 2.1 at 2048 px; dispersed convolution and its
layers, which their settings name but no published run switches on; preset `faithful`. The weak network of 1.5 at 2048
px is the authors' list for tests, the only list at hand. Our choice: the rules that extend these settings to any size;
in preset `default`, no FreeU, and below 3x the deepest down block is dilated too (the authors' list names a block that
SDXL does not have). Only the unconditional half runs through the weak network here. The authors' code computes both
halves and drops one. On SDXL the authors' last step leaves a little noise, ours none. The reference is not read, except
with `init: noised_lr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, Branch, Branches, guide
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.settings import FromNoise, MicroConditioned, area
from resmaster_stages.models.bases.base import Layers

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
class ScaleCrafter(FromNoise, MicroConditioned):
    """Direct inference with dilated convolutions. It needs only a prompt, and is best below 3x.

    A field that is null has the value that the authors published for the canvas's size.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": SAMPLING,
        "faithful": {**SAMPLING, "negative_prompt": "", "down": False, "freeu": True},
    }
    version: ClassVar[int] = 2

    method: Literal["scalecrafter"] = "scalecrafter"
    dilate_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps with dilated convolutions, the paper's tau. null: for SDXL 0.6, and 0.7 from 3x on."""
    progressive: bool | None = None
    """Whether the dilation falls step by step. null: from 3x on."""
    damped_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps with noise-damped guidance. null: for SDXL 0, and 0.7 from 3x on."""
    down: bool = True
    """Below 3x: dilate the deepest down block too. The authors' list misses this block on SDXL."""
    dispersed: bool = False
    """Dispersed convolution: the deepest layers reach as far with denser kernels of 5 x 5. The authors describe it, but
    none of their published runs switches it on."""
    freeu: bool = False
    """FreeU, which the authors' programs switch on."""

    def needs(self) -> Mapping[Ability, str]:
        """Convolutions are dilated."""
        return {"convolutions": "method scalecrafter"}

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas at every step, with a third branch while guidance is damped. The count is that of SDXL,
        whatever the model."""
        left, native = self.left(self.start, course), grid.window * grid.unit_px
        height, width = grid.height_px or grid.height * grid.unit_px, grid.width_px or grid.width * grid.unit_px
        damped = make_plan(height / native, width / native, self.steps, self).damped_until
        third = max(0, damped - left.start) if course.guided and self.guidance_scale > 1 else 0
        yield UnetWork(self.rows(left, course) + third, area(grid.height, grid.width, grid))

    def compose(self, request: Request) -> Composition:
        """Direct inference with replaced guidance rule and convolutions."""
        from resmaster_stages.diffusion.convolutions import changed_layers

        models, native = request.models, request.models.geometry.native_px
        whose = models.base.layers or "sdxl"
        plan = make_plan(request.height / native, request.width / native, self.steps, self, whose)
        rules = layer_rules(models.base.denoiser, plan)
        patches: tuple[Patch, ...] = (partial(changed_layers, rules=rules),)
        return whole_canvas_composition(
            request,
            NoiseDamped(self.guidance_scale, plan.damped_until),
            patches=patches,
            freeu=self.freeu,
            micro_conditioning=self.micro_conditioning,
        )


WEAK = Branch("weak", False)
"""The branch with the negative prompt through the weakly dilated network."""


@dataclass(frozen=True)
class NoiseDamped:
    """weak + scale * (text - negative) before step `until`, and classifier-free guidance from there on.

    Scale 1: the text branch alone.
    """

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


DEEP = ("mid_block.resnets", "up_blocks.0.resnets", "up_blocks.0.upsamplers")
DISPERSED: dict[Layers, tuple[str, ...]] = {
    "sdxl": ("down_blocks.-1.resnets", *DEEP),
    "sd1": (
        "down_blocks.2.downsamplers",
        "down_blocks.3.resnets",
        *DEEP,
        "up_blocks.1.resnets",
        "up_blocks.1.upsamplers",
    ),
}
DISPERSED["sd2"] = DISPERSED["sd1"]


def _up(number: int, factor: float) -> dict[str, float]:
    return dict.fromkeys((f"up_blocks.{number}.resnets", f"up_blocks.{number}.upsamplers"), factor)


def _down(number: int, factor: float) -> dict[str, float]:
    return dict.fromkeys((f"down_blocks.{number}.resnets", f"down_blocks.{number}.downsamplers"), factor)


def moderate(scale: float, down: bool) -> dict[str, float]:
    """Layers and dilations for a canvas whose longer side is below three times the native size.

    down: dilate the deepest down block, whatever its number. Otherwise the authors' `down_blocks.3`, which SDXL does
    not have.
    """
    return {f"down_blocks.{-1 if down else 3}.resnets": scale, **dict.fromkeys(DEEP, scale)}


def between(scale: float) -> dict[str, float]:
    """Layers and dilations for Stable Diffusion 1.5 and 2.1 above 2x and below 3x, published for 1.5 at 1280 px."""
    less = 0.8 * scale
    return {
        "down_blocks.1.downsamplers": less,
        **_down(2, scale),
        "down_blocks.2.resnets": less,
        "down_blocks.3.resnets": scale,
        **dict.fromkeys(DEEP, scale),
        "up_blocks.1.resnets": less,
        "up_blocks.1.upsamplers": scale,
        **_up(2, less),
    }


def strong(vertical: float, horizontal: float, whose: Layers = "sdxl") -> dict[str, float]:
    """Layers and dilations for a larger canvas. `vertical`, `horizontal`: its height and width over the native size."""
    scale = max(vertical, horizontal)
    deep = dict.fromkeys(DEEP, scale)
    if whose == "sdxl":
        down = float(ceil(sqrt(vertical * horizontal)))
        return {"down_blocks.-1.resnets": down, **deep, **_up(1, 0.75 * scale), "up_blocks.2.resnets": 0.5 * scale}
    outer = {**_up(1, scale), **_up(2, 0.75 * scale), "up_blocks.3.resnets": 0.5 * scale}
    if whose == "sd1":
        return {
            **_down(0, 0.5 * scale),
            **_down(1, 0.75 * scale),
            **_down(2, scale),
            **_down(3, scale),
            **deep,
            **outer,
        }
    return {**_down(2, scale), "down_blocks.2.resnets": 0.75 * scale, **_down(3, scale), **deep, **outer}


def weak(vertical: float, horizontal: float, whose: Layers = "sdxl") -> dict[str, float]:
    """Layers and dilations of the weak network, from which the unconditional prediction comes."""
    scale = max(vertical, horizontal)
    if whose == "sdxl":
        return moderate(min(scale, 2.0), False)
    if whose == "sd1":
        return {**_down(2, scale), **_down(3, scale), **dict.fromkeys(DEEP, scale), **_up(1, scale)}
    return {name: factor for name, factor in strong(vertical, horizontal, whose).items() if "up_blocks.3" not in name}


def durations(scale: float, whose: Layers) -> tuple[float, float]:
    """(fraction of the steps with dilation, fraction of the steps with noise-damped guidance)."""
    if scale >= 3:
        return (0.74, 0.74) if whose == "sd2" else (0.7, 0.7)
    if whose == "sdxl":
        return 0.6, 0.0
    return (0.7 if scale > 2 else 0.4 if whose == "sd2" else 0.6), 0.0


@dataclass(frozen=True)
class Plan:
    """Which layers are dilated, by how much and until which step."""

    strong: Mapping[str, float]
    weak: Mapping[str, float]
    until: int
    damped_until: int
    progressive: bool
    dispersed: tuple[str, ...] = ()
    """Places of the layers that use dispersed convolution."""

    def dilation(self, factor: float, index: int) -> float:
        """Dilation at step `index` of a layer whose dilation is `factor` at the start."""
        if index >= self.until or factor <= 1:
            return 1.0
        return float(max(ceil(factor * (self.until - index) / self.until), 2)) if self.progressive else factor


def make_plan(vertical: float, horizontal: float, steps: int, settings: ScaleCrafter, whose: Layers = "sdxl") -> Plan:
    """The plan for a canvas `vertical` times as high and `horizontal` times as wide as a native image."""
    scale = max(vertical, horizontal)
    large = scale >= 3
    until, damped = durations(scale, whose)
    until = until if settings.dilate_until is None else settings.dilate_until
    damped = damped if settings.damped_until is None else settings.damped_until
    progressive = settings.progressive if settings.progressive is not None else large
    if large:
        layers = strong(vertical, horizontal, whose)
    else:
        layers = between(scale) if whose != "sdxl" and scale > 2 else moderate(scale, settings.down)
    return Plan(
        strong=layers if scale > 1 else {},
        weak=weak(vertical, horizontal, whose) if scale > 1 else {},
        until=round(until * steps),
        damped_until=round(damped * steps) if scale > 1 else 0,
        progressive=progressive,
        dispersed=DISPERSED[whose] if settings.dispersed and scale > 1 else (),
    )


def layer_rules(unet: object, plan: Plan) -> dict[str, LayerRule]:
    """Rules for each dilated convolution, at each step and for the strong and the weak network."""
    from resmaster_stages.diffusion.convolutions import PLAIN, Dilated, Dispersed
    from resmaster_stages.diffusion.dispersion import dispersed_weight
    from resmaster_stages.diffusion.patches import chosen_layers
    from resmaster_stages.models.bases.base import network_of

    strong_layers, weak_layers = (chosen_layers(unet, each, "scalecrafter") for each in (plan.strong, plan.weak))
    spread = chosen_layers(unet, dict.fromkeys(plan.dispersed, 1.0), "scalecrafter")
    kernels = {name: dispersed_weight(network_of(unet).get_submodule(name).weight) for name in spread}

    def rule(name: str, index: int, branch: Branch) -> Layer:
        factor = (weak_layers if branch == WEAK else strong_layers).get(name, 1.0)
        dilation = plan.dilation(factor, index)
        if dilation == 1:
            return PLAIN
        return Dispersed(dilation, kernels[name]) if name in kernels else Dilated(dilation)

    return {name: partial(rule, name) for name in strong_layers | weak_layers}
