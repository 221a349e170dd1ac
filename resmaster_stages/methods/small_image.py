"""Predicts the low-res images beside the canvas, with the noise level of each step.

They are predicted whole, with the global prompt and without image prompts, as when a low-res image is generated. The
low-res image need not have been generated: its latents are noised anew for each step, always by the same noise. Where
it wraps, a UNet predicts it by circular convolutions; a transformer has none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resmaster_stages.diffusion.circular import circular
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.guidance import ClassifierFree, DenoiserCall
from resmaster_stages.diffusion.loop import predict, static_batches
from resmaster_stages.diffusion.reference import resized
from resmaster_stages.models.schedule import Step

if TYPE_CHECKING:
    from resmaster_stages.methods.request import Request

Predictor = Callable[[Step, DenoiserCall], Tensor]
"""(a step, the call that patches read) -> the predicted x0 of the low-res images [B, C, h, w]."""


def predictor(request: Request, draw: Tensor, guidance: ClassifierFree) -> Predictor:
    """Predicts the low-res images, noised by `draw` [B, C, h, w]."""
    models, reference = request.models, request.required_reference()
    size = tuple(reference.small.shape[-2:])
    conditions = make_conditions(
        models,
        request.canvas(),
        request.prompts,
        request.negative_prompts if guidance.scale != 1 else (),
        guidance_scale=request.config.guidance_scale,
        sizes=[(*size, 0, 0, *size)] * len(request.prompts),
    )
    batches = static_batches(len(conditions), request.view_limit, models.device)
    wraps = reference.wraps if "convolutions" in models.base.family.abilities else (False, False)

    def predicted(step: Step, call: DenoiserCall) -> Tensor:
        small = step.noised(reference.small_latents, draw)
        call.step, call.branches = step, guidance.branches(step)
        timestep = torch.full((), step.t, device=models.device)
        with circular(models.base.denoiser, wraps):
            outputs = predict(models.base, small, timestep, conditions, call, batches)
        return step.split(small, guidance.combine(outputs, step))[0]

    return predicted


def time_matched(
    request: Request,
    draw: Tensor,
    guidance: ClassifierFree,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[Step], Tensor]:
    """HiFlow's reference: at each step the predicted x0 of the low-res images, enlarged bicubically to the canvas
    [B, C, H, W].

    within: a context for the predictions, where patches of the canvas's views must not act on them.
    """
    small, call = predictor(request, draw, guidance), DenoiserCall()
    wraps = request.required_reference().wraps

    def enlarged(step: Step) -> Tensor:
        with request.models.base.image_scale(0), within():
            x0 = small(step, call)
        return resized(x0, *request.canvas_size, wraps=wraps)

    return enlarged
