"""FreeScale (Qiu et al., ICCV 2025): a cascade of whole-canvas stages, each from the enlarged picture of the one before.

Each stage decodes, enlarges in RGB, encodes, adds noise up to step 15 of 50 and denoises from there, with
- restrained dilation: nine deep convolutions on the way down, by the canvas's scale, until step 35;
- scale fusion: every self-attention takes its coarse part from windows of the native size (`scale_fusion`);
- detail control: every noisy latent is pulled to the enlarged picture's, by cosine ** `alpha`.

Authors' word: all of the above, and preset `faithful` (FreeU; windows that see zero tokens beyond the canvas; a blur that
also mixes neighbouring feature channels, as their kernel does and their paper does not say). Our choice in preset
`default`: none of those three. Different in both: the encoder's mode instead of a sample; square windows also where the
picture is not square; window places once per step and level instead of once per layer. Detail control by region
(`alpha_elsewhere` and a mask of the picture) is theirs; where the mask comes from is the user's affair. Windows run as one batch on projections that are computed once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.diffusion import autoencoder
from resmaster_stages.diffusion.convolutions import PLAIN, Dilated, LayerRule, changed_layers
from resmaster_stages.diffusion.freeu import freeu
from resmaster_stages.diffusion.guidance import Branch, Moment
from resmaster_stages.diffusion.loop import CanvasNoise, Composition, Patch
from resmaster_stages.diffusion.patches import chosen_layers
from resmaster_stages.diffusion.reference_guidance import skip_residual
from resmaster_stages.diffusion.scale_fusion import Windows, scale_fusion
from resmaster_stages.methods import direct
from resmaster_stages.methods.passes import Stage, first_step, phase_scales
from resmaster_stages.methods.request import Request
from resmaster_stages.models.schedule import Step

DILATED = ("down_blocks.-2.downsamplers", "down_blocks.-1.resnets", "mid_block.resnets")


def layer_rules(unet: object, factor: int, until: int) -> dict[str, LayerRule]:
    """The nine convolutions, `factor` times dilated before step `until`."""

    def rule(index: int, branch: Branch) -> Dilated:
        return Dilated(float(factor)) if index < until else PLAIN

    if factor == 1:
        return {}
    return dict.fromkeys(chosen_layers(unet, dict.fromkeys(DILATED, float(factor)), "freescale"), rule)


def detail_control(request: Request, height: int, width: int) -> float | Tensor:
    """Exponent of the pull to the enlarged picture, by place where there is a mask: [B or 1, 1, height, width]."""
    settings = request.config.freescale
    if request.detail is None or settings.alpha_elsewhere is None:
        return settings.alpha
    mask = F.interpolate(request.detail, (height, width), mode="bilinear", align_corners=False, antialias=True)
    mask = mask.to(request.models.device)
    return settings.alpha_elsewhere + (settings.alpha - settings.alpha_elsewhere) * mask


def _compose(request: Request, scale: float, x0: Tensor, noise: CanvasNoise, draw: Tensor) -> Composition:
    """One stage, `scale` times the low-res picture, that follows `x0` [B, C, h, w] noised by `draw`."""
    config, settings, moment = request.config, request.config.freescale, Moment()
    models, reference = request.models, request.required_reference()
    factor = max(1, max(request.height, request.width) // models.geometry.native_px)
    rules = layer_rules(models.base.denoiser, factor, round(settings.dilate_until * config.steps))
    patches: tuple[Patch, ...] = (partial(changed_layers, rules=rules, moment=moment),)
    if settings.fusion:
        windows = Windows(*request.canvas_size, models.geometry.native, settings.jitter, noise.generators, moment)
        radius = max(1, round(scale)) - 1
        patches = (
            *patches,
            partial(scale_fusion, windows=windows, radius=radius, features=settings.blur == "features"),
        )
    if settings.freeu:
        patches = (*patches, freeu)
    return direct.whole_canvas_composition(
        request,
        latent_hooks=(skip_residual(x0, draw, detail_control(request, *request.canvas_size)),),
        patches=patches,
        moment=moment,
        size=reference.small.shape[-2:],
    )


def stages(request: Request) -> tuple[Stage, ...]:
    """One stage per size, each restarted in the middle of the path."""
    config, settings, models = request.config, request.config.freescale, request.models
    models.require("method freescale", "convolutions", "attention")
    reference, factor = request.required_reference(), models.geometry.latent_factor

    def stage(scale: float) -> Stage:
        rows, cols = (max(1, round(side * scale / config.scale)) for side in request.canvas_size)

        def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
            pixels = reference.small if previous is None else autoencoder.decode(models, previous).clamp(-1, 1)
            large = F.interpolate(pixels, size=(rows * factor, cols * factor), mode="bicubic", align_corners=False)
            x0, draw = autoencoder.encode(models, large.clamp(-1, 1)), noise()
            here = replace(request, height=rows * factor, width=cols * factor)
            return step.noised(x0, draw), _compose(here, scale, x0, noise, draw)

        return Stage(rows, cols, begin, first_step(settings.start, config.steps))

    return tuple(stage(scale) for scale in phase_scales(config.scale, settings.phases, refine=False))
