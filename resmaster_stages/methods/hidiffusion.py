"""HiDiffusion (Zhang et al., ECCV 2024): direct inference with a UNet whose deep levels keep their native size.

- resolution-aware UNet: in the first steps, where the layout is decided, one down-sampling goes down by 4 instead of 2
  (a convolution with taps two cells apart); in the steps after, features are pooled between a layer on the way down and
  one on the way up. So the deep levels see the whole image, as in an image of half the size.
- self-attention of the finest level that has it looks inside quarters of the canvas, which is rolled by a random part
  of a quarter at every step and layer.

From the authors: the layers and durations for SDXL up to 4x and from there on, for SDXL Turbo, and for Stable Diffusion
1.5 and 2.1; preset `faithful`. Their rules count latents; here they count native sizes, which is the same for their
models and serves others. Ours: nothing is changed on a canvas that is not larger than native; a UNet of any depth is
changed at the block above its deepest; rolls are drawn from the sample's own generator, and self-attention stays plain
where a side is odd (the authors resize features). Preset `default` takes their rule for SDXL Turbo with all models like
SDXL, which is our choice: pooling alone keeps objects whole, and is cheaper. The reference is not read, except with
`init: noised_lr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.method import register
from resmaster_stages.diffusion.cost import UnetWork
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.passes import Pass
from resmaster_stages.methods.settings import FromNoise, LateGuidance, MicroConditioned, area
from resmaster_stages.models.bases.base import Layers, network_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.config.model import ModelConfig
    from resmaster_stages.diffusion.loop import CanvasNoise, Composition, Patch
    from resmaster_stages.methods.request import Request
    from resmaster_stages.models.bases.base import Ability
    from resmaster_stages.models.schedule import Course, Step

SAMPLING: dict[str, Any] = {"stepper": "ddim_ancestral"}

GOOD_UP_TO = 2.0
"""The scale from which on textures become grids."""


@register
class HiDiffusion(FromNoise, LateGuidance, MicroConditioned):
    """Direct inference with deep levels of the native size: the quickest way from a prompt to 2x.

    A field that is null has the value of the rule.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": SAMPLING,
        "faithful": {**SAMPLING, "rule": "sdxl"},
    }

    method: Literal["hidiffusion"] = "hidiffusion"
    rule: Literal["turbo", "sdxl"] = "turbo"
    """Durations for models like SDXL. `turbo`: features are pooled in the first half of the steps (the authors' rule
    for SDXL Turbo). `sdxl`: those of the authors for SDXL, by the canvas's size. Stable Diffusion 1.5 and 2.1 have
    durations of their own."""
    strided_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps in which one down-sampling goes down by 4. null: that of the rule, which is 0 for `turbo`,
    and for `sdxl` 0.16, or 0.3 from 4x on."""
    pooled_until: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the steps until which features are pooled. null: that of the rule, which is 0.5 for `turbo`, and for
    `sdxl` 0.4, or 0.7 from 4x on. Below 4x they are pooled only where no down-sampling goes down by 4."""
    windows: bool = True
    """Self-attention of the finest level inside quarters of the canvas. It saves a seventh of the work at 2x."""

    def needs(self) -> Mapping[Ability, str]:
        """Down-sampling is changed, and self-attention looks inside quarters."""
        attention: dict[Ability, str] = {"attention": "method hidiffusion"} if self.windows else {}
        return {"convolutions": "method hidiffusion", **attention}

    def notes(self, model: ModelConfig) -> Iterator[str]:
        """A line about scales that are too large."""
        if self.scale > GOOD_UP_TO:
            yield (
                f"upscale.scale: method hidiffusion is good up to {GOOD_UP_TO:g}x, and textures become grids at "
                f"{self.scale:g}x; use scale: {GOOD_UP_TO:g}, or a method that follows the low-res image"
            )

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        """The whole canvas at every step. That its deep levels are small is not counted."""
        yield UnetWork(self.rows(self.left(self.start, course), course), area(grid.height, grid.width, grid))

    def passes(self, request: Request) -> tuple[Pass, ...]:
        """One pass, whose rolls are drawn after its noise."""
        (free,) = super().passes(request)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            z, composition = free.begin(previous, noise, step)
            return z, replace(composition, patches=patches(request, self, noise.generators))

        return (replace(free, begin=begin),)

    def compose(self, request: Request) -> Composition:
        """The whole canvas as one view."""
        return whole_canvas_composition(
            request, self.guidance(request.models), micro_conditioning=self.micro_conditioning
        )


@dataclass(frozen=True)
class Levels:
    """The down blocks at which a UNet is changed, counted from the deepest (-1)."""

    strided: int
    """The block whose down-sampling goes down by 4."""
    pooled: int
    """The block in which features are pooled."""
    windows: int
    """The block whose self-attention, and that of the up block beside it, looks inside quarters."""


LEVELS: dict[Layers, Levels] = {"sdxl": Levels(-2, -2, -2), "sd1": Levels(-4, -3, -4), "sd2": Levels(-4, -3, -4)}

LARGE = 4
"""From this scale on, of the shorter side, the authors have durations for large canvases."""


@dataclass(frozen=True)
class Plan:
    """The steps in which the UNet is changed."""

    strided: range = range(0)
    pooled: range = range(0)


def make_plan(scales: tuple[float, float], steps: int, settings: HiDiffusion, whose: Layers = "sdxl") -> Plan:
    """The plan for a canvas whose sides are `scales` times the native size."""
    if max(scales) <= 1:
        return Plan()
    large = min(scales) >= LARGE
    if whose != "sdxl":
        strided, pooled = (0.7, 0.3) if large else (0.4, 0.0)
    elif settings.rule == "turbo":
        strided, pooled = 0.0, 0.5
    else:
        strided, pooled = (0.3, 0.7) if large else (8 / 50, 0.4)
    strided = strided if settings.strided_until is None else settings.strided_until
    pooled = pooled if settings.pooled_until is None else settings.pooled_until
    last = int(strided * steps)
    return Plan(range(last), range(last if whose == "sdxl" and not large else 0, int(pooled * steps)))


def patches(request: Request, settings: HiDiffusion, generators: list[torch.Generator]) -> tuple[Patch, ...]:
    """What is changed in the UNet: nothing on a canvas that is not larger than native. Raises ConfigError for a UNet
    without these blocks."""
    from resmaster_stages.diffusion.convolutions import PLAIN, changed_layers
    from resmaster_stages.diffusion.patches import chosen_layers
    from resmaster_stages.diffusion.resolution_aware import STRIDED, draw_moves, pooled, quartered, sizes_forwarded

    base, (height, width) = request.models.base, request.canvas_size
    unet, whose, native = base.denoiser, base.layers or "sdxl", base.geometry.native
    scales = (height / native, width / native)
    if max(scales) <= 1:
        return ()
    plan, levels, depth = make_plan(scales, len(request.path), settings, whose), LEVELS[whose], depth_of(unet, whose)
    found: tuple[Patch, ...] = (lambda denoiser, call: sizes_forwarded(denoiser),)
    if plan.strided:
        convolutions = chosen_layers(unet, {f"down_blocks.{levels.strided}.downsamplers": 2.0}, "hidiffusion")
        rules = dict.fromkeys(convolutions, lambda index, branch: STRIDED if index in plan.strided else PLAIN)
        found = (*found, partial(changed_layers, rules=rules))
    if plan.pooled:
        found = (*found, partial(pooled, level=depth + levels.pooled, steps=plan.pooled))
    if settings.windows:
        names = self_attentions(unet, depth + levels.windows)
        moves = draw_moves(generators, len(request.path), len(names))
        found = (*found, partial(quartered, names=names, size=(height, width), moves=moves))
    return found


def depth_of(unet: Any, whose: Layers) -> int:
    """The number of down blocks. Raises ConfigError if there are too few to change one."""
    depth, levels = len(network_of(unet).down_blocks), LEVELS[whose]
    needed = -min(levels.strided, levels.pooled, levels.windows)
    if depth < needed:
        raise ConfigError(
            f"method hidiffusion: the model's UNet has {depth} down blocks, and {needed} are needed; use an SDXL or "
            "Stable Diffusion model"
        )
    return depth


def self_attentions(unet: Any, level: int) -> tuple[str, ...]:
    """Names of the self-attentions of down block `level` and of the up block beside it."""
    network = network_of(unet)
    places = (f"down_blocks.{level}.", f"up_blocks.{len(network.down_blocks) - 1 - level}.")
    return tuple(name for name, _ in network.named_modules() if name.startswith(places) and name.endswith(".attn1"))
