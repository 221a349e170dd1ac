"""The denoising loop: it predicts on views, fuses the predictions on the canvas, edits x0 and steps once.

    for each step:   z      = hooks(z)                         e.g. DemoFusion's skip residual
                     for each group of views:
                         views  = cut(z)
                         output = fuse(guide(denoise(views)))  all views and guidance branches in static batches
                     x0     = hooks(x0(z, mix of outputs))     e.g. the low-frequency swap
                     z      = stepper(z, x0, eps)              once, on the canvas

The loop fuses predictions, not stepped latents. For a deterministic first-order step both give the same result, because
such a step is affine in its prediction. A stochastic step then draws its noise once, on the canvas. A method
(`resmaster_stages.methods`) is a Composition of the parts: it may add hooks, groups and patches, but not change the
loop.

Determinism: all noise comes from one CPU generator per sample, so it depends on the sample's seed alone. The size of
the batches decides only which kernels the device picks. Another `view_batch` gives the same image up to rounding. The
same `view_batch` on the same device gives the same bytes.

Invariants:
- The canvas is float32 whatever the denoiser's precision. Nothing in the loop waits for the device.
- Patches are undone when the loop ends, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.cost import count_call
from resmaster_stages.diffusion.guidance import DenoiserCall, Guidance
from resmaster_stages.diffusion.steppers import Stepper
from resmaster_stages.diffusion.text_projections import text_projected_once
from resmaster_stages.models.acceleration import changed_blocks_uncompiled, compiled_blocks
from resmaster_stages.models.bases.base import Base
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Step

LatentHook = Callable[[Tensor, Step], Tensor]
"""Edits the noisy latents [B, C, H, W] before the prediction of a step."""
X0Hook = Callable[[Tensor, Step], Tensor]
"""Edits the clean latents x0 [B, C, H, W] that a step predicts."""
Patch = Callable[[Any, DenoiserCall], AbstractContextManager[None]]
"""A context manager that changes the denoiser within its block."""
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""
After = Callable[[Step, Tensor, Tensor], Tensor]
"""Called after each step with (the step, its noisy latents, its x0) [B, C, H, W]. Gives the latents to go on from."""


class Views(Protocol):
    """Cuts canvases [B, C, H, W] into views [B * views, C, h, w], sample by sample, and fuses such views into
    canvases."""

    def cut(self, canvas: Tensor) -> Tensor: ...

    def fuse(self, views: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ViewGroup:
    """Views of one shape that are predicted in the same way, and the weight of their prediction in a step."""

    at: Callable[[Step], tuple[Views, Conditions]]
    """The views of a step and their conditions. `always(views, conditions)` gives the same ones at every step."""
    guidance: Guidance
    weight: Callable[[Step], float] = lambda step: 1.0
    """Weight of this group's prediction. The weights of all groups sum to one at every step. Weight 0 skips the
    group."""
    prepare: LatentHook = lambda z, step: z
    """Gives the latents that the group's views are cut from, instead of z.

    The step is still taken from z: the prediction is read as if it were made for z. So with r = z less these latents,
    x0 is greater than that of the views by r on a flow path, and by r / alpha where noise is predicted.
    """


def always(views: Views, conditions: Conditions) -> Callable[[Step], tuple[Views, Conditions]]:
    """The same views at every step."""
    return lambda step: (views, conditions)


@dataclass(frozen=True)
class Composition:
    """The parts of one pass of a method."""

    groups: tuple[ViewGroup, ...]
    stepper: Stepper
    latent_hooks: tuple[LatentHook, ...] = ()
    x0_hooks: tuple[X0Hook, ...] = ()
    patches: tuple[Patch, ...] = ()
    image_scale: float = 0.0
    """Weight of image prompts. 0: there are none."""


def batch_size(items: int, largest: int) -> int:
    """Items per call: the size that computes the fewest items twice, and the greatest such size.

    Sizes from above a quarter of `largest` up to `largest` are considered. 49 views in calls of at most 16 are 7 calls
    of 7.
    """
    if items <= largest:
        return items
    return min(range(largest, largest // 4, -1), key=lambda size: -items % size)


@dataclass(frozen=True)
class Batch:
    """The items of one denoiser call, for the device and for Python, which must not wait for the device."""

    items: Tensor  # [n], long
    numbers: tuple[int, ...]


def static_batches(items: int, largest: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The items of each call. All calls have `batch_size` items, so that they have one shape.

    A last call that would be shorter repeats the last item, and the results for the repeats are dropped.
    """
    size = batch_size(items, largest)
    parts = torch.arange(items + -items % size, device=device).clamp(max=items - 1).split(size)
    numbers = [min(number, items - 1) for number in range(items + -items % size)]
    return [Batch(part, tuple(numbers[place * size :][:size])) for place, part in enumerate(parts)]


def _rows(views: Tensor, items: Tensor, branches: int, dtype: torch.dtype) -> Tensor:
    """The denoiser's input for `items` [n] of `views` [N, C, h, w], branch by branch: [branches * n, C, h, w].

    The rows are written once, on GPUs in the layout that convolutions prefer there.
    """
    layout = torch.channels_last if views.is_cuda else torch.contiguous_format
    shape = (branches * len(items), *views.shape[1:])
    rows = torch.empty(shape, dtype=dtype, device=views.device, memory_format=layout)
    chosen = views[items]
    for part in rows.split(len(items)):
        part.copy_(chosen)
    return rows


def predict(
    base: Base,
    views: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    call: DenoiserCall,
    batches: Sequence[Batch],
) -> list[Tensor]:
    """Predict all views: one tensor [N, C, h, w] in float32 per branch of `call`. One denoiser call per batch."""
    outputs, branches, denoiser = [], call.branches, base.denoiser
    for batch in batches:
        items = batch.items
        sample = _rows(views, items, len(branches), denoiser.dtype)
        rows = conditions.rows(items, branches, batch.numbers)
        call.items, call.states = items, rows.states
        call.texts = conditions.texts(items, branches)
        count_call(len(sample), sample[0, 0].numel() / base.geometry.native**2)
        output = denoiser(sample, timestep, return_dict=False, **base.arguments(rows))[0]
        outputs.append(output.float().chunk(len(branches)))
    return [torch.cat(parts)[: len(views)] for parts in zip(*outputs)]


Seed = int | torch.Generator
"""What all noise of an image is drawn from."""


def generator_of(seed: Seed) -> torch.Generator:
    """The CPU generator that begins with a seed, or goes on from a generator. One of another device gives a seed."""
    if isinstance(seed, torch.Generator):
        if seed.device.type == "cpu":
            return seed
        seed = int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    return torch.Generator("cpu").manual_seed(seed)


class CanvasNoise:
    """Draws standard normal noise for canvases [B, C, H, W].

    Each sample has a CPU generator of its own, so the noise does not depend on how samples are batched.
    """

    def __init__(self, seeds: Sequence[Seed], channels: int, height: int, width: int, device: torch.device) -> None:
        self.shape = (1, channels, height, width)
        self.device = device
        self.generators = [generator_of(seed) for seed in seeds]

    def resized(self, height: int, width: int) -> CanvasNoise:
        """Noise for canvases of another size, from the same generators, so that passes of one image never share a
        draw."""
        other = CanvasNoise((), self.shape[1], height, width, self.device)
        other.generators = self.generators
        return other

    def __call__(self) -> Tensor:
        return torch.cat([torch.randn(self.shape, generator=each) for each in self.generators]).to(self.device)


@contextmanager
def _kernels(same_bytes: bool) -> Iterator[None]:
    """Within the block, cuDNN picks deterministic kernels by rule; without `same_bytes`, the fastest by a benchmark."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = not same_bytes, same_bytes
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
    after: After | None = None,
) -> Tensor:
    """Denoise latents [B, C, H, W] from the first step's noise level to clean latents, float32."""
    c, denoiser, call = composition, models.base.denoiser, DenoiserCall()
    timesteps = torch.tensor([step.t for step in schedule], device=models.device)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_kernels(models.same_bytes))
        stack.enter_context(models.using(denoiser))
        stack.enter_context(models.base.image_scale(c.image_scale))
        for patch in c.patches:
            stack.enter_context(patch(denoiser, call))
        if models.device.type == "cpu" and not compiled_blocks(denoiser):
            stack.enter_context(text_projected_once(denoiser, call))
        stack.enter_context(changed_blocks_uncompiled(denoiser))
        for step, t in zip(schedule, timesteps):
            for hook in c.latent_hooks:
                z = hook(z, step)
            output = torch.zeros_like(z)
            for group in (each for each in c.groups if each.weight(step)):
                views, conditions = group.at(step)
                batches = static_batches(len(conditions), view_batch, models.device)
                call.step, call.branches = step, group.guidance.branches(step)
                cut = views.cut(group.prepare(z, step))  # [B * views, C, h, w]
                predictions = predict(models.base, cut, t, conditions, call, batches)
                output += group.weight(step) * views.fuse(group.guidance.combine(predictions, step))  # [B, C, H, W]
            x0, eps = step.split(z, output)
            for hook in c.x0_hooks:
                x0 = hook(x0, step)
            z = c.stepper(z, x0, eps, step, noise)
            if after:
                z = after(step, z, x0)
    return z
