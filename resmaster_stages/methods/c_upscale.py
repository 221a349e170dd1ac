"""C-Upscale (IJCV 2025): views that are denoised from the noised reference, with three priors.

- global structure: the low frequencies of every predicted x0 come from the reference (`structure`);
- regional semantics: each view has its own caption;
- regional attention: a view attends to the global prompt only as the whole picture does in that place.

Authors' word, by the abstract and public notes: the three priors, the start from the noised reference, overlapping views.
There is no public code, and the paper's tables and constants were not at hand. Our reconstruction: the composer of
regional attention and captions (`diffusion.composer`) and its share of one half, the filter (ResMaster's, in Nyquist frequencies of the low-res picture and at every step), and the start
at 45 % of the noise, which third-party notes give. So preset `faithful` is the same as `default`: nothing better is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmaster_stages.diffusion.composer import Composer
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import TEXT, Moment
from resmaster_stages.diffusion.loop import (
    CanvasNoise,
    Composition,
    LatentHook,
    Patch,
    ViewGroup,
    X0Hook,
    always,
    predict,
    static_batches,
)
from resmaster_stages.diffusion.reference_guidance import structural_guidance
from resmaster_stages.diffusion.steppers import make_stepper
from resmaster_stages.methods.passes import Stage, first_step
from resmaster_stages.methods.request import Request
from resmaster_stages.models.schedule import Step


def whole_picture(request: Request, composer: Composer, draw: Tensor) -> LatentHook:
    """Before each step: predicts the low-res pictures, noised by `draw` [B, C, h, w], for the composer to see."""
    models, reference = request.models, request.required_reference()
    size = tuple(reference.small.shape[-2:])
    conditions = make_conditions(
        models,
        request.canvas(),
        request.prompts,
        request.negative_prompts,
        guided=False,
        sizes=[(*size, 0, 0, *size)] * len(request.prompts),
    )
    batches = static_batches(len(conditions), request.view_limit, models.device)

    def look(z: Tensor, step: Step) -> Tensor:
        small = step.noised(reference.small_latents, draw)
        moment = composer.moment
        moment.step, moment.branches = step, (TEXT,)
        with composer.capturing():
            predict(models.base, small, torch.full((), step.t, device=models.device), conditions, moment, batches)
        return z

    return look


def stages(request: Request) -> tuple[Stage, ...]:
    """One stage, from the noised reference."""
    config, settings, models = request.config, request.config.c_upscale, request.models
    reference, grid = request.required_reference(), request.views()

    def begin(previous: Tensor | None, noise: CanvasNoise, step: Step) -> tuple[Tensor, Composition]:
        z, moment = step.noised(reference.latents, noise()), Moment()
        look: tuple[LatentHook, ...] = ()
        patches: tuple[Patch, ...] = ()
        if settings.share:
            models.require("upscale.c_upscale.share", "attention")
            small = reference.small_latents.shape[-2:]
            composer = Composer(grid, small, settings.share, moment, models.device)
            look = (whole_picture(request, composer, noise.resized(*small)()),)
            patches = (*patches, composer.patch)
        structure: tuple[X0Hook, ...] = ()
        if config.structure.enabled:
            structure = (structural_guidance(reference.latents, config.structure, reference.scale, config.steps),)
        conditions = make_conditions(
            models,
            grid,
            request.view_texts(grid),
            request.per_view(request.negative_prompts, grid),
            guided=request.guided,
            micro_conditioning=config.micro_conditioning,
        )
        views = Fuser(grid, config.fuse, models.device)
        return z, Composition(
            groups=(ViewGroup(always(views, conditions), request.guidance()),),
            stepper=make_stepper(config.stepper),
            latent_hooks=look,
            x0_hooks=structure,
            patches=patches,
            moment=moment,
        )

    return (Stage(*request.canvas_size, begin, first_step(settings.start, config.steps)),)
