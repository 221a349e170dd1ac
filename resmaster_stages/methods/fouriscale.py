"""FouriScale (Huang et al., ECCV 2024): direct inference with convolutions that are dilated and low-pass filtered.

Dilation alone lets high frequencies alias into the wider taps; so the features of every dilated layer lose them first. A
second text branch, filtered weakly and dilated less, keeps detail and takes its attention maps from the first: guidance
goes from the negative prediction to the second branch's. Dilation falls from step 20 of 50 on and is off from step 35;
there both text branches would be the same, so the second is left out.

Authors' word: all of the above, the SDXL settings, and a floor of 0 for Stable Diffusion 1.5 and 2.1 (whose layers here are
the same places of the deeper UNet: our choice). The filter is theirs on the spectrum; here it is two products with
the circulant matrix of its impulse response (the same numbers, no transforms), symmetric in frequency, where their mask
is off by one bin between positive and negative frequencies. In preset `default` FreeU is off. The reference is not read,
except with `init: noised_lr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmaster_stages.config.methods import FouriScaleConfig
from resmaster_stages.diffusion.buckets import base_size
from resmaster_stages.diffusion.convolutions import PLAIN, Dilated, LayerRule, changed_layers, dilated
from resmaster_stages.diffusion.freeu import freeu
from resmaster_stages.diffusion.guidance import NEGATIVE, TEXT, Branch, Branches, Moment, guide
from resmaster_stages.diffusion.loop import Composition, Patch
from resmaster_stages.diffusion.patches import Layer, bare, chosen_layers, replaced_forward
from resmaster_stages.methods import direct
from resmaster_stages.methods.request import Request
from resmaster_stages.models.schedule import Step

DETAIL = Branch("detail", True)
"""The prompt once more, through the weakly filtered network."""

FILTERED = ("down_blocks.-1.resnets", "mid_block.resnets", "up_blocks.0.resnets", "up_blocks.1.resnets")
DILATED_ONLY = ("up_blocks.0.upsamplers",)


def mask(length: int, factor: float, weak: bool, floor: float) -> Tensor:
    """Gain of each frequency index 0 ... length // 2 of an axis: [length // 2 + 1], float64.

    1 up to the Nyquist frequency of the axis made `factor` times smaller (and one index more), then a line down to
    `floor`: steep (an eighth of the axis) or, for the weak filter, just down to the end of the spectrum.
    """
    half = length // 2
    ramp = (factor - 1) * length // (2 * factor) if weak else max(length // 8, 1)
    index = torch.arange(half + 1, dtype=torch.float64).clamp(max=max(half - 1, 0))
    if ramp == 0:
        return torch.ones_like(index)
    return (1 + (1 - floor) / ramp * (half / factor + 1 - index)).clamp(floor, 1)


@lru_cache(maxsize=512)
def filter_matrix(
    length: int, factor: float, weak: bool, floor: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The filter along an axis of `length` cells as a circulant matrix [length, length]: y = matrix @ x."""
    response = torch.fft.irfft(mask(length, factor, weak, floor).to(torch.complex128), n=length)
    index = torch.arange(length)
    return response[(index[:, None] - index) % length].to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Filtered:
    """A convolution with taps `dilation` cells apart, of features without the frequencies above 1 / `factor` Nyquist."""

    factor: float
    dilation: int
    weak: bool
    floor: float
    covered: tuple[float, float]
    """Height and width that the features are padded to with zeros before the filter, over their own."""

    def __call__(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C', h / stride, w / stride], rounded up."""
        height, width = x.shape[-2:]
        rows, cols = (max(side, round(side * more)) for side, more in zip((height, width), self.covered))
        down, across = (
            filter_matrix(n, max(self.factor / stride, 1.0), self.weak, self.floor, x.device, x.dtype)
            for n, stride in zip((rows, cols), conv.stride)
        )
        padded = F.pad(x, (0, cols - width, 0, rows - height))
        return dilated(conv, (down @ padded @ across.T)[..., :height, :width], self.dilation)


@dataclass(frozen=True)
class Plan:
    """Dilation over the steps, and the base size that the canvas is a multiple of."""

    base: tuple[int, int]
    factor: int
    full_until: int
    until: int

    def dilation(self, index: int) -> float:
        """Dilation at step `index`: full, falling by a line, off."""
        if index >= self.until:
            return 1.0
        if index < self.full_until:
            return float(self.factor)
        return max((self.factor - 1) * (self.until - index) / (self.until - self.full_until) + 1, 1.0)


def make_plan(height: int, width: int, native_px: int, steps: int, settings: FouriScaleConfig) -> Plan:
    """The plan of a canvas of `height` x `width` px."""
    base, factor = base_size(height, width, native_px)
    return Plan(base, factor, round(settings.full_until * steps), round(settings.until * steps))


def layer_rules(unet: Any, plan: Plan, covered: tuple[float, float], floor: float) -> dict[str, LayerRule]:
    """How each convolution is computed at each step, in the strongly and in the weakly filtered branches."""

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


@contextmanager
def shared_attention(unet: Any, moment: Moment) -> Iterator[None]:
    """Within the block the detail branch attends within the canvas as the text branch does: it has its own values only."""

    def like_text(plain: Any) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = plain(x, *args, **kwargs)
            if DETAIL not in moment.branches:
                return y
            rows = list(y.chunk(len(moment.branches)))
            rows[moment.branches.index(DETAIL)] = rows[moment.branches.index(TEXT)]
            return torch.cat(rows)

        return forward

    with ExitStack() as stack:
        for name, module in bare(unet).named_modules():
            if name.endswith((".attn1.to_q", ".attn1.to_k")):
                stack.enter_context(replaced_forward(module, like_text(module.forward)))
        yield


@dataclass(frozen=True)
class DetailGuidance:
    """negative + scale * (detail - negative) before step `until`; classifier-free guidance after it. Scale 1: text alone.

    Before step `amplified_until` the scale is `amplification` times as great.
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


def compose(request: Request) -> Composition:
    """Direct inference, its guidance rule, convolutions and self-attention replaced; told the size of the base."""
    config, settings, moment = request.config, request.config.fouriscale, Moment()
    models = request.models
    models.require("method fouriscale", "convolutions", "attention")
    plan = make_plan(request.height, request.width, models.geometry.native_px, config.steps, settings)
    canvas = [side * models.geometry.latent_factor for side in request.canvas_size]
    covered = (plan.factor * plan.base[0] / canvas[0], plan.factor * plan.base[1] / canvas[1])
    floor = settings.floor if settings.floor is not None else 0.6 if models.base.layers == "sdxl" else 0.0
    rules = layer_rules(models.base.denoiser, plan, covered, floor)
    patches: tuple[Patch, ...] = (
        partial(changed_layers, rules=rules, moment=moment),
        partial(shared_attention, moment=moment),
    )
    if settings.freeu:
        patches = (*patches, freeu)
    guidance = DetailGuidance(
        config.guidance_scale, plan.until if rules else 0, settings.amplification, plan.full_until if rules else 0
    )
    return direct.whole_canvas_composition(request, guidance=guidance, patches=patches, moment=moment, size=plan.base)
