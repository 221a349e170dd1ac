"""The denoising loop: predict on views, fuse on the canvas, edit x0, step once.

    for each step:   views  = cut(z)
                     output = fuse(guide(unet(views)))         all views and guidance branches in static batches
                     x0     = hooks(x0(z, output))             e.g. the low-frequency swap
                     z      = stepper(z, x0, eps)              once, on the canvas

Predictions are fused rather than stepped latents: every deterministic first-order step is affine in its prediction, so
both are the same, and stochastic steps then draw their noise once, on the canvas. A method (`resmaster_stages.methods`)
is a Composition of the parts; it may add hooks and patches, but not change the loop.

Determinism: all noise comes from one CPU generator per sample, so it depends on the sample's seed alone. The batch of
views decides only which kernels the device picks: another `view_batch` gives the same picture up to rounding, the same
`view_batch` on the same device the same bytes.

Invariants:
- The canvas is float32 whatever the UNet's precision. Nothing in the loop waits for the device.
- Patches are undone when the loop ends, exceptions included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.schedule import Step
from resmaster_stages.diffusion.steppers import Stepper
from resmaster_stages.models.loading import Models

X0Hook = Callable[[Tensor, Step], Tensor]
"""Edits the predicted clean latents [B, C, H, W] of a step."""
Patch = Callable[[Any], AbstractContextManager[None]]
"""Changes the UNet within a block."""
Progress = Callable[[int, int], None]
"""Hears (steps done, steps in all)."""


@dataclass(frozen=True)
class Composition:
    """What a method is made of."""

    fuser: Fuser
    conditions: Conditions
    stepper: Stepper
    guidance_scale: float
    x0_hooks: tuple[X0Hook, ...] = ()
    patches: tuple[Patch, ...] = ()


def static_batches(items: int, largest: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Item numbers [n] of each UNet call: ceil(items / largest) calls of one shape, as even as can be.

    Where the last call is short, it repeats the last item; what comes out for the repeats is dropped.
    """
    calls = -(-items // largest)
    size = -(-items // calls)
    return list(torch.arange(calls * size, device=device).clamp(max=items - 1).split(size))


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + scale * (conditional - unconditional)


def predict(
    unet: Any, views: Tensor, timestep: Tensor, conditions: Conditions, guidance_scale: float, batches: Sequence[Tensor]
) -> Tensor:
    """Guided prediction of every view: [N, C, h, w] -> [N, C, h, w], float32. One UNet call per batch."""
    outputs = []
    for items in batches:
        x = views[items].to(unet.dtype)
        guided = conditions.negative is not None
        rows = torch.cat([x, x]) if guided else x
        output = unet(rows, timestep, **conditions.batch(items), return_dict=False)[0].float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = guide(unconditional, conditional, guidance_scale)
        outputs.append(output)
    return torch.cat(outputs)[: len(views)]


class CanvasNoise:
    """Standard normal noise for canvases [B, C, H, W]: one CPU generator per sample, so batches do not matter."""

    def __init__(self, seeds: Sequence[int], channels: int, height: int, width: int, device: torch.device) -> None:
        self.shape = (1, channels, height, width)
        self.device = device
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.cat([torch.randn(self.shape, generator=each) for each in self.generators]).to(self.device)


@contextmanager
def _same_kernels() -> Iterator[None]:
    """Within the block cuDNN picks deterministic kernels, by rule rather than by race."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def denoise(
    models: Models,
    composition: Composition,
    schedule: Sequence[Step],
    z: Tensor,
    noise: Callable[[], Tensor],
    *,
    view_batch: int,
    progress: Progress | None = None,
) -> Tensor:
    """Latents [B, C, H, W] at the first step's noise level -> clean latents, float32."""
    c = composition
    batches = static_batches(len(c.conditions), view_batch, models.device)
    timesteps = torch.tensor([step.t for step in schedule], device=models.device)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_same_kernels())
        stack.enter_context(models.using(models.unet))
        for patch in c.patches:
            stack.enter_context(patch(models.unet))
        for step, t in zip(schedule, timesteps):
            views = c.fuser.cut(z)  # [B * views, C, h, w]
            output = c.fuser.fuse(predict(models.unet, views, t, c.conditions, c.guidance_scale, batches))
            x0, eps = step.split(z, output)
            for hook in c.x0_hooks:
                x0 = hook(x0, step)
            z = c.stepper(z, x0, eps, step, noise)
            if progress:
                progress(step.index + 1, step.count)
    return z
